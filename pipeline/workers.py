"""Work that shares nothing, in several processes at once: models of a run, points of a sweep."""

import io
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout

import torch
from tqdm import tqdm

from pipeline.evaluate import evaluate
from pipeline.settings import Settings, resolve
from pipeline.stage import lock, unlearned_name
from pipeline.stages import unlearn_stage


def start_worker(threads: int):
    tqdm.set_lock(threading.RLock())  # tqdm's default leaves a warning where a worker is ended
    sys.stderr = open(os.devnull, "w")  # progress bars; the parent shows what a worker raises
    torch.set_num_threads(threads)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """Or a worker whose parent was killed would go on writing, in a run no longer locked."""
    multiprocessing.parent_process().join()
    os._exit(1)


def run_each(function, items: list, jobs: int, title: str):
    """function of each item, as they come, `jobs` processes at a time, with a bar."""
    if jobs == 1 or len(items) < 2:
        yield from map(function, tqdm(items, desc=title))
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(min(jobs, len(items)), multiprocessing.get_context("spawn"),
                               start_worker, (threads,))
    try:
        futures = [pool.submit(function, item) for item in items]
        for future in tqdm(as_completed(futures), desc=title, total=len(items)):
            yield future.result()
    finally:
        for worker in multiprocessing.active_children():  # or they would end their items first
            worker.terminate()
        pool.shutdown(cancel_futures=True)


def unlearn_and_evaluate(s: Settings) -> str:
    """What it prints, which the parent shows in one piece, beside its bar."""
    with redirect_stdout(io.StringIO()) as text:
        unlearn_stage(s)
        evaluate(s.run, unlearned_name(s))
    return text.getvalue()


def unlearn_each(options: dict, each: list[str]):
    """Unlearned models share nothing: on two cores two are made at once, with the same bytes."""
    several = [resolve(options | dict(zip(("method", "objective"), x.split(":")))) for x in each]
    with lock(several[0].run):
        for text in run_each(unlearn_and_evaluate, several, os.cpu_count() or 1, "unlearn"):
            tqdm.write(text, end="")
