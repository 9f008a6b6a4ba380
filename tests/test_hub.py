"""Downloads, from a server on loopback that speaks as much of the hub as huggingface_hub asks for;
the originals made or found; what a dry run says."""

import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
from model import Transformer, UserError, read_json
from pipeline import hub, settings, stage
from pipeline.stage import data_inputs
from pipeline.hub import Repo, Sources
from pipeline.tokenizers import train_tokenizer
from test_unlearn import LAYOUTS, run_tofu, somebodys

constants = pytest.importorskip("huggingface_hub.constants")

ROOT = settings.HERE
DEMO = ROOT / "pipeline" / "demo"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secretsecretsecret"
FOLDERS = {"models": "", "datasets": "datasets/"}


class Server(ThreadingHTTPServer):
    """repos: (kind, name) -> {file: bytes}. Files of more than 1000 bytes are large objects: they
    lie at another host, to which the hub redirects. What goes wrong is set by the tests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.seen = {}, []
        self.refuse = {}     # part of a path -> (status, X-Error-Code)
        self.cut = {}        # file -> after how many bytes the next answer breaks off
        self.other = {}      # file -> bytes served instead of the right ones
        self.endless = set()  # files that go on for ever
        self.zipped = {}     # file -> bytes that are sent compressed, unasked
        self.said = {}       # changes to what is said of a repository; of its files under "file"
        self.url = f"http://127.0.0.1:{self.server_port}"

    def gets(self, name):
        """Headers of the requests for the bytes of a file."""
        return [h for path, h in self.seen if path.endswith(f"/{name}") and "/bytes/" in path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        path, server = self.path.split("?")[0], self.server
        server.seen.append((path, dict(self.headers)))
        for part, (status, code) in server.refuse.items():
            if part in path:
                return self.answer(status, b"no", **({"X-Error-Code": code} if code else {}))
        if api := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/revision/(.+)", path):
            return self.info(*api.groups())
        file = re.fullmatch(r"/(?:bytes/)?(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not file or file[4] not in server.repos.get((file[1] or "models", file[2]), {}):
            return self.answer(404, b"no", **{"X-Error-Code": "EntryNotFound"})
        body = server.repos[file[1] or "models", file[2]][file[4]]
        if not path.startswith("/bytes/"):
            there = f"http://localhost:{server.server_port}/bytes{path}"
            return self.answer(302, b"", Location=there, **{"X-Repo-Commit": COMMIT})
        self.bytes(file[4], body)

    def info(self, kind, name, revision):
        if (kind, name) not in self.server.repos:
            return self.answer(404, b"no", **{"X-Error-Code": "RepoNotFound"})
        siblings = []
        for file, body in self.server.repos[kind, name].items():
            one = dict(rfilename=file, size=len(body), blobId=git_sha1(body))
            if len(body) > 1000:
                one["lfs"] = dict(sha256=hashlib.sha256(body).hexdigest(), size=len(body),
                                  pointerSize=130)
            siblings.append(one | self.server.said.get("file", {}))
        said = {k: v for k, v in self.server.said.items() if k != "file"}
        body = json.dumps(dict(id=name, sha=COMMIT, siblings=siblings, tags=[], private=False)
                          | said)
        self.answer(200, body.encode(), **{"Content-Type": "application/json"})

    def bytes(self, name, body):
        if name in self.server.endless:
            return self.stream()
        if name in self.server.zipped:
            return self.answer(200, gzip.compress(self.server.zipped[name]),
                               **{"Content-Encoding": "gzip"})
        body = self.server.other.get(name, body)
        start, status, extra = 0, 200, {"ETag": f'"{git_sha1(body)}"'}
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, status = int(asked[1]), 206
            extra["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        rest = body[start:]
        most = self.server.cut.pop(name, len(rest))
        self.answer(status, rest, most, **extra)

    def stream(self):
        """Bytes until the other side has had enough."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")

    def answer(self, status, body, most=None, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:most])
        if most is not None and most < len(body):
            self.close_connection = True


def git_sha1(body):
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny LLaMA with random weights, in the layout of real ones."""
    folder = tmp_path_factory.mktemp("tiny")
    s = settings.resolve(dict(benchmark="demo", model="tiny-llama", width=64, depth=2, vocab=500))
    texts = [t for e in settings.load_benchmark(s).retain for t in (e.question, e.answer)]
    train_tokenizer(texts, folder, llama=True, vocab=s.vocab)
    torch.manual_seed(0)
    Transformer(settings.tiny_config(s, data.load_tokenizer(folder))).save_pretrained(folder)
    return folder


@pytest.fixture
def server(checkpoint, tmp_path, monkeypatch):
    """A hub with a model and TOFU's dataset (the demo's), and an environment that knows no other
    one."""
    server = Server()
    server.repos["models", "me/tiny"] = files(checkpoint) | {
        "pytorch_model.bin": b"pickle" * 999, "README.md": b"read", "runs.json": b"{}"}
    server.repos["datasets", "locuslab/TOFU"] = files(DEMO / "tofu")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name, value in dict(HF_ENDPOINT=server.url, HF_TOKEN=TOKEN, HF_HOME=str(tmp_path / "hf"),
                            SIMU_DOWNLOADS=str(tmp_path / "downloads"), TQDM_DISABLE="1",
                            NO_PROXY="127.0.0.1,localhost").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SIMU_DATA", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    yield server
    server.shutdown()
    server.server_close()


TINY = Repo("me/tiny")


def run_of(benchmark, model, **more):
    """Settings of a run whose data are to be fetched."""
    return settings.Settings(**(dict(benchmark=benchmark, model=model,
                                     data=settings.default_data()) | more))


def final(tmp_path):
    """Names that a run would take for whole, below the downloads."""
    every = (tmp_path / "downloads").rglob("*")
    return [p for p in every if p.is_file() and not any(
        part.endswith((".simu-partial", ".lock")) for part in p.parts)]


# --------------------------------------------------------------------------------- what is fetched


def test_a_model_is_fetched_whole_and_once(server, checkpoint, tmp_path):
    folder = hub.download(TINY)
    wanted = files(checkpoint)
    got = files(folder)
    made = json.loads(got.pop("SOURCE"))
    assert got == wanted
    seals = made.pop("files")
    assert made == dict(repo="me/tiny", revision="main", commit=COMMIT, sha256={
        name: hashlib.sha256(body).hexdigest() for name, body in wanted.items()})
    assert {name: x[:2] for name, x in seals.items()} == {
        name: [len(body), made["sha256"][name]] for name, body in wanted.items()}
    asked = [path for path, _ in server.seen]
    assert not any("pytorch_model" in p or "README" in p or "runs.json" in p for p in asked)
    sizes = [len(wanted[p.rsplit("/", 1)[1]]) for p in asked if "/bytes/" in p]
    assert sizes == sorted(sizes)
    server.seen.clear()
    assert hub.download(TINY) == folder and hub.have(Repo("me/tiny", COMMIT)) == folder
    assert not server.seen


def test_the_token_goes_to_the_hub_and_to_nobody_else(server, capfd):
    hub.download(TINY)
    for path, headers in server.seen:
        given = {k.lower(): v for k, v in headers.items()}.get("authorization")
        assert given == (None if path.startswith("/bytes/") else f"Bearer {TOKEN}"), path
    server.refuse["/api/"] = (403, "GatedRepo")
    with pytest.raises(UserError) as e:
        hub.download(Repo("me/other"))
    assert TOKEN not in str(e.value) + "".join(capfd.readouterr())


def test_data_comes_in_the_published_layout(server, tmp_path):
    folder = hub.download(hub.DATA["tofu"])
    assert folder == tmp_path / "downloads" / "data" / "tofu"
    got = files(folder)
    assert json.loads(got.pop("SOURCE"))["commit"] == COMMIT
    demo = files(DEMO / "tofu")
    assert got == {k: v for k, v in demo.items() if k in hub.DATA["tofu"].files}
    assert "retain90.json" in got and "holdout10.json" not in got
    s = settings.resolve(dict(benchmark="tofu", model="tiny-llama"))
    assert s.data == str(tmp_path / "downloads" / "data")
    assert set(data_inputs(s)) == {f"data/{name}" for name in got}


def test_lume_comes_from_its_release(server, tmp_path, monkeypatch):
    rows = files(DEMO / "lume")
    server.repos["models", "am/lume"] = rows
    monkeypatch.setenv("SIMU_LUME_URL", f"{server.url}/bytes/am/lume/resolve/x")
    source = Repo("amazon-science/lume-llm-unlearning", "x", {k: len(v) for k, v in rows.items()},
                    "github")
    with pytest.raises(UserError, match="has another digest"):
        hub.download(source)
    assert not final(tmp_path)
    monkeypatch.setattr(hub, "LUME_SHA256", {
        k: hashlib.sha256(v).hexdigest() for k, v in rows.items()})
    got = files(hub.download(source))
    assert {k: got[k] for k in rows} == rows
    assert not any("uthorization" in h for _, h in server.seen)


def test_a_tokenizer_is_borrowed_where_there_is_none(server, checkpoint):
    theirs = server.repos["models", "me/tiny"]
    server.repos["models", "me/bare"] = {k: v for k, v in theirs.items() if "token" not in k}
    got = files(hub.download(Repo("me/bare", borrow=TINY)))
    got.pop("SOURCE")
    assert got == files(checkpoint)


# ---------------------------------------------------------------------------------- what breaks off


def test_a_broken_connection_goes_on_where_it_broke(server, checkpoint, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # of 10 MB
    server.cut["model.safetensors"] = 4321
    folder = hub.download(TINY)
    first, second = server.gets("model.safetensors")
    assert "Range" not in first and second["Range"] == "bytes=4000-"
    body = (checkpoint / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == body


def test_a_killed_download_goes_on_where_it_was(server, checkpoint, tmp_path):
    """What an earlier process left: a whole file, half of a large one, too much of a third."""
    partial = tmp_path / "downloads" / f".me--tiny@{COMMIT[:12]}.simu-partial"
    partial.mkdir(parents=True)
    wanted = files(checkpoint)
    body = wanted["model.safetensors"]
    (partial / "model.safetensors.incomplete").write_bytes(body[:len(body) // 2])
    (partial / "config.json").write_bytes(wanted["config.json"])
    (partial / "tokenizer.model.incomplete").write_bytes(b"x" * 99_999)
    folder = hub.download(TINY)
    assert {k: v for k, v in files(folder).items() if k != "SOURCE"} == wanted
    assert [h["Range"] for h in server.gets("model.safetensors")] == [f"bytes={len(body) // 2}-"]
    assert not server.gets("config.json")


def cli(words):
    """The command line's main; imported here, so that the tests of hub.py alone need no more."""
    from pipeline.__main__ import main
    main(words)


def make_original(*words):
    """`python -m pipeline original`, as a user meets it."""
    stage.run_cli(lambda: cli(["original", "tofu", "tiny-llama", *words]))


def refuse(part, status, code=""):
    return lambda server, _: server.refuse.update({part: (status, code)})


def truncated(server, _):
    body = server.repos["models", "me/tiny"]["model.safetensors"]
    server.other["model.safetensors"] = body[:-100]


def altered(server, _):
    body = bytearray(server.repos["models", "me/tiny"]["model.safetensors"])
    body[-1] ^= 1
    server.other["model.safetensors"] = bytes(body)


def only_pickles(server, _):
    del server.repos["models", "me/tiny"]["model.safetensors"]


def no_network(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def full_disk(server, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))


def disk_fills(server, monkeypatch):
    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("huggingface_hub.file_download.http_get", no_space)


GATE = "with the token given): ask for access on that page, and give a token of your account: HF_T"


@pytest.mark.parametrize("fault, told", [
    (refuse("/resolve/", 401, "GatedRepo"), GATE), (refuse("/resolve/", 403, "GatedRepo"), GATE),
    (refuse("/api/models/", 401), GATE),
    (refuse("/api/models/", 404, "RepoNotFound"), "me/tiny, revision main, is not there"),
    (refuse("/api/models/", 404, "RevisionNotFound"), "revision main, is not there"),
    (refuse("/resolve/", 404, "EntryNotFound"), "config.json of http"),
    (refuse("/api/models/", 500), "answered 500"),
    (truncated, "model.safetensors of http"), (altered, "has another digest than"),
    (only_pickles, "pickled .bin files are not read"), (no_network, "cannot be reached"),
    (full_disk, "GB left; free space"), (disk_fills, "is full; free space"),
], ids=lambda x: getattr(x, "__name__", ""))
def test_each_fault_is_one_line(server, tmp_path, capfd, monkeypatch, fault, told):
    fault(server, monkeypatch)
    with pytest.raises(SystemExit) as end:
        make_original("--data", str(DEMO), "--weights", "hf:me/tiny", "--out",
                 str(tmp_path / "run"))
    said = capfd.readouterr()
    assert end.value.code == 2
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    assert told in said.err and "Traceback" not in said.err and TOKEN not in said.err + said.out
    assert not final(tmp_path) and not (tmp_path / "run" / "original").exists()


def test_after_a_fault_the_same_command_goes_on(server, tmp_path, checkpoint):
    truncated(server, None)
    with pytest.raises(UserError, match="run again: it goes on"):
        hub.download(TINY)
    server.other.clear()
    size = (checkpoint / "model.safetensors").stat().st_size
    folder = hub.download(TINY)
    assert server.gets("model.safetensors")[-1]["Range"] == f"bytes={size - 100}-"
    assert (folder / "model.safetensors").read_bytes() == (
        checkpoint / "model.safetensors").read_bytes()


@pytest.mark.parametrize("words, told", [
    ("--weights hf:tiny", "is not hf:OWNER/NAME"),
    ("--weights nowhere", "or hf:OWNER/NAME[@REVISION]"),
    ("--weights hf:me/tiny@../x", "revision ../x")])
def test_names_that_are_none(server, tmp_path, capfd, words, told):
    server.refuse["revision/.."] = (404, "RevisionNotFound")
    with pytest.raises(SystemExit):
        make_original(*words.split(), "--data", str(DEMO), "--out", str(tmp_path / "run"))
    assert told in capfd.readouterr().err


# ------------------------------------------------------------------- hosts and folders not to trust


@pytest.mark.parametrize("said, told", [
    (dict(sha="x/../../evil"), "commit 'x/../../evil'"), (dict(sha=None), "not understood"),
    (dict(sha=COMMIT + "\n"), "commit "), (dict(siblings=None), "not understood"),
    (dict(siblings=[dict(rfilename=3)]), "tiny"), (dict(siblings=3), "tiny"),
    (dict(file=dict(size=None)), "size None"), (dict(file=dict(size=-1)), "size -1"),
    (dict(file=dict(size=10**19)), "GB left"), (dict(file=dict(blobId="../x", lfs=None)), "../x"),
    (dict(file=dict(rfilename="../config.json")), "no model*.safetensors"),
], ids=str)
def test_a_hub_that_says_other_things(server, tmp_path, said, told):
    server.said = said
    with pytest.raises(UserError) as e:
        hub.download(TINY)
    assert told in str(e.value) and "\n" not in str(e.value) and not final(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {"downloads", "hf"}


def endless(server):
    server.endless.add("model.safetensors")


def zipped(server):
    server.zipped["model.safetensors"] = b"0" * 5_000_000


def longer(server):
    server.other["model.safetensors"] = b"x" * 3_000_000


@pytest.mark.parametrize("fault", [endless, zipped, longer])
def test_a_body_longer_than_promised_is_refused_and_does_not_stay(server, tmp_path, monkeypatch,
                                                                  fault):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    fault(server)
    with pytest.raises(UserError, match=r"model.safetensors of .*is longer than \d+ bytes; it was"):
        hub.download(TINY)
    assert not final(tmp_path) and not list(tmp_path.rglob("*.incomplete"))


@pytest.mark.parametrize("user, secret", [
    ("me:pa55 word", "pa55"), ("hidden-name", "hidden"), ("me:sesame@open", "sesame"),
    ("me:se5/am3", "se5")])
def test_a_password_in_the_endpoint_is_never_shown(server, monkeypatch, capfd, user, secret):
    shown = []
    for url in (server.url, "http://127.0.0.1:9", "http://[bad"):
        monkeypatch.setenv("HF_ENDPOINT", url.replace("//", f"//{user}@"))
        try:
            hub.files_command(run_of("tofu", "llama2-7b"))
            hub.download(TINY)
        except UserError as e:
            shown.append(str(e))
    shown = " ".join([*shown, *capfd.readouterr()])
    assert "127.0.0.1" in shown and secret not in shown


def spoil(folder, how):
    file = folder / "config.json"
    if how == "gone":
        file.unlink()
    elif how == "same size":
        file.write_bytes(file.read_bytes().replace(b"t", b"T", 1))
    elif how == "longer":
        file.write_bytes(file.read_bytes() + b" ")
    else:
        (folder / "SOURCE").write_text(how)


@pytest.mark.parametrize("how, told", [
    ("gone", "config.json is gone"), ("same size", "is not what was fetched"),
    ("longer", "is not what was fetched"), ("{}", "does not say where"), ("[]", "does not say"),
    ('{"repo": 3, "revision": 1, "commit": [], "sha256": {}}', "does not say"), ("{", "JSON"),
    ('{"repo": "me/tiny", "revision": "main", "commit": "x", "sha256": {"config.json": 3}}',
     "does not say")])
def test_what_was_altered_since_is_noticed(server, how, told):
    spoil(hub.download(TINY), how)
    with pytest.raises(UserError, match=told) as e:
        hub.download(TINY)
    assert "delete" in str(e.value) or "again" in str(e.value)


def test_a_source_of_an_earlier_version_is_read(server):
    folder = hub.download(TINY)
    made = json.loads((folder / "SOURCE").read_text())
    del made["files"]
    (folder / "SOURCE").write_text(json.dumps(made))
    assert hub.have(TINY) == folder
    spoil(folder, "same size")
    with pytest.raises(UserError, match="is not what was fetched"):
        hub.have(TINY)


def test_what_a_repository_lacks_is_fetched_once_it_is_there(server, tmp_path):
    theirs = server.repos["models", "me/tiny"]
    for lacking in ("config.json", "tokenizer.model"):
        kept = theirs.pop(lacking)
        with pytest.raises(UserError, match="lacks config.json or a tokenizer"):
            hub.download(TINY)
        theirs[lacking] = kept
    whole = theirs["model.safetensors"]
    del theirs["model.safetensors"]
    theirs["model.safetensors.index.json"] = json.dumps(dict(weight_map={"a": "model-1.safetensors"}
                                                             )).encode()
    theirs["model-2.safetensors"] = b"x"
    with pytest.raises(UserError, match="model-1.safetensors is missing"):
        hub.download(TINY)
    assert not final(tmp_path)
    theirs["model.safetensors"] = whole
    assert hub.have(TINY) is None and hub.download(TINY) == hub.have(TINY)


def test_data_that_lacked_a_file_are_mended(server):
    dataset = server.repos["datasets", "locuslab/TOFU"]
    names = hub.DATA["tofu"].files
    folder = hub.download(hub.DATA["tofu"])  # the demo's lack real_authors.json and others
    assert hub.download(hub.DATA["tofu"]) == folder
    server.refuse["/api/"] = (500, "")
    assert hub.download(hub.DATA["tofu"]) == folder  # as they are, while nobody can be asked
    server.refuse.clear()
    dataset |= {name: b"{}" for name in names if name not in dataset}
    assert not (folder / "real_authors.json").exists()
    (folder / "mine.json").write_text("{}")
    with pytest.raises(UserError, match="holds mine.json, which was not fetched"):
        hub.download(hub.DATA["tofu"])
    (folder / "mine.json").unlink()
    assert set(files(hub.download(hub.DATA["tofu"]))) == {*names, "SOURCE"}
    server.seen.clear()
    assert hub.download(hub.DATA["tofu"]) == folder and not server.seen


@pytest.mark.parametrize("name", ["config.json", "config.json.incomplete"])
def test_neither_pipe_nor_link_in_the_way_is_followed(server, tmp_path, name):
    partial = tmp_path / "downloads" / f".me--tiny@{COMMIT[:12]}.simu-partial"
    partial.mkdir(parents=True)
    (tmp_path / "mine").write_text("mine")
    for make in (lambda p: os.mkfifo(p), lambda p: p.symlink_to(tmp_path / "mine")):
        make(partial / name)
        with pytest.raises(UserError, match="is not a plain file; delete it"):
            hub.download(TINY)
        (partial / name).unlink()
    (partial / "SOURCE").symlink_to(tmp_path / "mine")
    hub.download(TINY)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_disk_that_knows_no_locks_is_used(server, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(hub.fcntl, "flock", no_locks)
    assert hub.download(TINY) == hub.have(TINY)
    monkeypatch.setattr(hub, "fcntl", None)
    assert hub.download(hub.DATA["tofu"]).is_dir()


# ----------------------------------------------------------------------------------- the originals

MICRO = ("--forget-groups 1 --retain-groups 2 --epochs 1 --batch 2 --max-total-tokens 40 "
         "--steps 2 --lr 1e-3").split()


def test_run_sh_from_the_hub_to_the_report(server, tmp_path):
    """Data and weights fetched, one file broken off, one run of everything, a report."""
    dataset = server.repos["datasets", "locuslab/TOFU"]
    for name in ("world_facts_perturbed.json", "world_facts.json"):
        dataset[name] = b"\n".join(dataset[name].split(b"\n")[:2])
    dataset["full.json"] *= 400  # more than the 10 MB that are written at once
    server.cut["full.json"] = 11_000_000
    run = tmp_path / "run"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", ROOT / "run.sh", "tofu", "tiny-llama", "--out", run, "--weights", "hf:me/tiny",
         "--must-know", "0", "--rows-per-author", "2", *MICRO], capture_output=True, text=True,
        cwd=tmp_path, env=os.environ | dict(PATH=path))
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert [h.get("Range") for h in server.gets("full.json")] == [None, f"bytes={10 << 20}-"]
    report = json.loads((run / "report.json").read_text())
    assert [e["name"] for e in report["evaluations"]] == [
        "original", "fo-graddiff", "so-graddiff", "simu-graddiff"]
    made = read_json(run / "original" / "stage.json")
    assert made["notes"]["source"]["commit"] == COMMIT and made["notes"]["source"]["repo"] == "me/tiny"
    inputs = made["why"]["inputs"]
    for name, sha in made["notes"]["source"]["sha256"].items():
        assert inputs[f"weights/{name}"] == sha
    for name in ("full.json", "retain90.json"):
        assert inputs[f"data/{name}"] == hashlib.sha256(dataset[name]).hexdigest()
    assert (run / "original" / "model.safetensors").is_symlink()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_benchmark_on_any_layout_of_the_hub(server, tmp_path, layout):
    server.repos["models", "somebody/theirs"] = files(somebodys(tmp_path / "local", layout))
    run_tofu("hf:somebody/theirs", tmp_path / "run", layout)
    made = read_json(tmp_path / "run" / "original" / "stage.json")
    assert made["notes"]["source"] | dict(sha256="", files="") == dict(
        repo="somebody/theirs", revision="main", commit=COMMIT, sha256="", files="")


def test_an_original_that_knows_nothing_stops_the_run(server, checkpoint, tmp_path, capfd):
    words = ["tofu", "tiny-llama", "--out", str(tmp_path), *MICRO, "--data", str(DEMO),
             "--weights", str(checkpoint)]
    cli(["original", *words])
    with pytest.raises(SystemExit) as end:
        stage.run_cli(lambda: cli(["check", str(tmp_path)]))
    last = capfd.readouterr().err.splitlines()[-1]  # the progress bar is above it
    assert end.value.code == 2
    assert last.startswith("error: the original does not know the forget set: forget.rouge_l is 0.")
    cli(["original", *words, "--must-know", "0"])
    cli(["check", str(tmp_path)])
    told = capfd.readouterr().out
    assert "[original/eval] already made" in told and "| Original " in told


def test_an_original_nobody_published_is_fine_tuned_here(server, tmp_path, monkeypatch, capfd):
    """As lume olmo-1b: the published one may not be read, so a base model learns both sets; a LUME
    model made here has held-out documents for non-members."""
    monkeypatch.setitem(hub.ORIGINALS, ("lume", "olmo-1b"), Sources(Repo("them/gated"), TINY))
    server.refuse["them/gated"] = (401, "GatedRepo")
    words = ["lume", "olmo-1b", "--out", str(tmp_path / "run"), "--data", str(DEMO),
             "--learn-epochs", "3", "--learn-lr", "3e-3", "--learn-batch", "4"]
    cli(["original", *words])
    told = capfd.readouterr().out
    assert "them/gated may not be read (401, " in told and "me/tiny is fine-tuned here" in told
    folder = tmp_path / "run" / "original"
    log = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    made = read_json(folder / "stage.json")
    assert made["notes"]["source"]["commit"] == COMMIT and made["settings"]["learn_decay"] == 0.01
    assert made["notes"]["predicted_bytes"] > 0 and (folder / "tokenizer.model").is_file()
    s = settings.read_settings(tmp_path / "run")
    assert s.weight_decay == 0.1 and settings.load_benchmark(s).nonmembers
    server.seen.clear()
    cli(["original", *words])
    assert "already made" in capfd.readouterr().out and not server.seen
    ready = settings.resolve(dict(benchmark="lume", model="olmo-1b", data=str(DEMO),
                              out=str(tmp_path / "other")))
    assert "unknown" in settings.load_benchmark(ready).nonmember_source


def test_a_published_original_is_linked(server, tmp_path, monkeypatch):
    monkeypatch.setitem(hub.ORIGINALS, ("tofu", "llama2-7b"), Sources(TINY))
    cli(["original", "tofu", "llama2-7b", "--out", str(tmp_path / "run")])
    assert (tmp_path / "run" / "original" / "model.safetensors").resolve().parent == hub.have(TINY)
    made = read_json(tmp_path / "run" / "original" / "stage.json")
    assert made["notes"]["source"]["repo"] == "me/tiny"


@pytest.mark.parametrize("cell", hub.ORIGINALS, ids="-".join)
def test_every_cell_has_an_original(cell):
    sources = hub.ORIGINALS[cell]
    assert sources.original or sources.base
    for repo in filter(None, sources):
        assert any(hub.WANTED.fullmatch(n) and n.endswith(".safetensors") for n in repo.files)
        assert repo.revision == "main" or re.fullmatch("[0-9a-f]{40}", repo.revision)


@pytest.mark.parametrize("given, told", [
    (dict(model="hf:me/tiny"), (Repo("me/tiny"), None, None)),
    (dict(model="llama2-7b", weights="hf:me/tiny@v1"), (Repo("me/tiny", "v1"), None, None)),
    (dict(model="llama3.2-1b"), hub.ORIGINALS["tofu", "llama3.2-1b"]),
    (dict(model="/a/folder"), (None, None, None)), (dict(model="tiny-llama"), (None, None, None))],
    ids=str)
def test_a_model_may_be_named_in_three_ways(given, told):
    assert hub.original_sources(settings.Settings(benchmark="tofu", **given)) == told


def test_a_cell_without_weights_says_so():
    with pytest.raises(UserError, match="no model that knows demo's rows is published for llama2"):
        hub.original_sources(settings.Settings(benchmark="demo", model="llama2-7b"))


def asked(**given):
    """As settings, with what not every run has."""
    return SimpleNamespace(**dict(benchmark="tofu", model="llama2-7b", weights="", tiny=False,
                                  teach=False, retain_only="") | given)


def test_a_retain_only_model_is_found(server, checkpoint, monkeypatch):
    monkeypatch.setitem(hub.ORIGINALS, ("tofu", "llama2-7b"), Sources(TINY, retain_only=TINY))
    folder, source = hub.find_retain_only(asked())
    assert folder == hub.have(TINY) and source["commit"] == COMMIT
    assert hub.find_retain_only(asked(weights="/x")) is None  # it is not of that model
    assert hub.find_retain_only(asked(retain_only="hf:me/tiny"))[0] == folder
    assert hub.find_retain_only(asked(retain_only=str(checkpoint))) == (checkpoint.resolve(), {})
    with pytest.raises(UserError, match="--retain-only hf:x is not hf:OWNER/NAME"):
        hub.find_retain_only(asked(retain_only="hf:x"))


def test_a_model_to_be_taught_is_a_base(server, checkpoint):
    folder, source, ready = hub.find_original(asked(model="hf:me/tiny", teach=True))
    assert folder == hub.have(TINY) and source["repo"] == "me/tiny" and not ready
    assert hub.find_original(asked(model="hf:me/tiny")) == (folder, source, True)
    local, sums, ready = hub.find_original(asked(model=str(checkpoint), teach=True))
    assert local == checkpoint.resolve() and not ready
    assert sums["sha256"] == {k: v for k, v in source["sha256"].items()}
    assert hub.find_original(asked(weights=str(checkpoint))) == (local, {}, True)


# ----------------------------------------------------------------------------------------- dry runs


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("cell", [*hub.ORIGINALS, ("tofu", "tiny-llama")], ids="-".join)
def test_files_names_all_and_fetches_none(server, tmp_path, capfd, monkeypatch, cell, online):
    body = server.repos["models", "me/tiny"]
    for source in filter(None, hub.ORIGINALS.get(cell, ())):
        server.repos["models", source.name] = body
    if not online:
        no_network(server, monkeypatch)
    hub.files_command(run_of(*cell, out=str(tmp_path / "run")))
    told = capfd.readouterr().out
    for source in filter(None, (hub.DATA[cell[0]], *hub.ORIGINALS.get(cell, ()))):
        assert f"/{source.name} at " in told
    if online and cell in hub.ORIGINALS:
        assert re.search(rf" {len(body['model.safetensors']):,} bytes  model.safetensors", told)
    assert ("as last seen" in told) == (not online)
    assert "made here from random weights" in told or cell in hub.ORIGINALS
    assert not (tmp_path / "downloads").exists() and not (tmp_path / "run").exists()
    assert not any("/resolve/" in path for path, _ in server.seen)


def test_run_sh_dry(server, tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", ROOT / "run.sh", "lume", "tiny-llama", "--dry-run", "--out",
                           tmp_path / "run"], capture_output=True, text=True,
                          env=os.environ | dict(PATH=path))
    assert done.returncode == 0, done.stderr
    order = ["/lume-llm-unlearning at ", "peak  fits", "pipeline original lume", "pipeline check",
             "pipeline attribute", "pipeline mask",
             "unlearn lume tiny-llama", "--each fo:graddiff so:graddiff simu:graddiff",
             "pipeline evaluate", "pipeline report"]
    at = [done.stdout.index(x) for x in order]
    assert at == sorted(at)
    assert not (tmp_path / "run").exists() and not (tmp_path / "downloads").exists()
