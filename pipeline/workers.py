"""Work that shares nothing, in several processes at once: models of a run, points of a sweep."""

import io
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from functools import partial

import torch
from tqdm import tqdm

from model import UserError
from pipeline.evaluate import evaluate
from pipeline.settings import Settings, resolve
from pipeline.stage import lock, locked_here, unlearned_name
from pipeline.stages import unlearn_stage


def start_worker(threads: int, held: list):
    locked_here.update(held)  # what the parent holds is held for its workers
    tqdm.set_lock(threading.RLock())  # its own is warned of where the worker is ended
    sys.stderr = open(os.devnull, "w")  # progress bars; the parent shows what a worker raises
    torch.set_num_threads(threads)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """A worker whose parent was killed would wait for work for ever, its memory held."""
    multiprocessing.parent_process().join()
    os._exit(1)


def submitted(pool, function, items: list) -> list:
    """Their futures. A worker, which starts here, is deaf to Ctrl-C from its first instruction."""
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return [pool.submit(function, item) for item in items]
    finally:
        signal.signal(signal.SIGINT, heard)


def run_each(function, items: list, jobs: int, title: str):
    """function of each item, as they come, `jobs` processes at a time, with a bar."""
    with tqdm(total=len(items), desc=title) as bar:
        if jobs == 1 or len(items) < 2:
            for item in items:
                yield function(item)
                bar.update()
            return
        context = multiprocessing.get_context("spawn")
        threads = max(1, (os.cpu_count() or 1) // jobs)
        pool = ProcessPoolExecutor(min(jobs, len(items)), context, start_worker,
                                   (threads, [*locked_here]))
        try:
            for done in as_completed(submitted(pool, function, items)):
                yield done.result()
                bar.update()
        except BrokenProcessPool:
            raise UserError(f"{title}: the system ended one of {jobs} workers, most likely for "
                            "want of memory; free some (a sweep: lower --jobs), and the same "
                            "command goes on: what is done is kept") from None
        except BaseException:
            for worker in multiprocessing.active_children():  # or they would end their points first
                worker.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def unlearn_and_evaluate(s: Settings):
    unlearn_stage(s)
    evaluate(s.run, unlearned_name(s))


def heard(work) -> str:
    """What work() has to say, which the parent prints whole."""
    with redirect_stdout(io.StringIO()) as told:
        work()
    return told.getvalue()


def unlearn_each(given: dict, each: list[str]):
    """Unlearned models share nothing: on two cores two are made at once, with the same bytes, and
    what they are compared with is evaluated beside them."""
    several = [resolve(given | dict(zip(("method", "objective"), pair.split(":"))))
               for pair in each]
    run, jobs = several[0].run, [partial(unlearn_and_evaluate, s) for s in several]
    if (run / "retain-only").exists():
        jobs.append(partial(evaluate, run, "retain-only"))
    with lock(run):
        for told in run_each(heard, jobs, os.cpu_count() or 1, "unlearn"):
            tqdm.write(told, end="")
