"""Downloads, from a server on loopback that speaks as much of the hub as huggingface_hub asks for;
and the originals that are linked or taught from them."""

import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import model as module
from model import Transformer, UserError, read_json
from pipeline import card, hub, original, plan, settings, slices, stage
from pipeline.__main__ import main
from pipeline.hub import Repo, Sources
from pipeline.tokenizers import load_tokenizer, train_tokenizer

constants = pytest.importorskip("huggingface_hub.constants")

DEMO = settings.HERE / "pipeline" / "demo"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secretsecretsecret"
TINY = Repo("me/tiny")


class Server(ThreadingHTTPServer):
    """Files of more than 1000 bytes are large objects: they lie at another host, to which the hub
    redirects."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.seen = {}, []  # (kind, name) -> {file: bytes}; requests
        self.refuse, self.short = {}, set()  # part of a path -> (status, code); files cut off
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, server = self.path.split("?")[0], self.server
        server.seen.append((self.command, path, dict(self.headers)))
        for part, (status, code) in server.refuse.items():
            if part in path:
                return self.answer(status, b"no", **({"X-Error-Code": code} if code else {}))
        if api := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree)/.+", path):
            return self.describe(*api.groups())
        pattern = r"/(bytes/)?(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)"
        elsewhere, kind, repo, revision, name = re.fullmatch(pattern, path).groups()
        body = server.repos.get((kind or "models", repo), {}).get(name)
        if body is None:
            return self.answer(404, b"no", **{"X-Error-Code": "EntryNotFound"})
        about = {"X-Repo-Commit": revision if len(revision) == 40 else COMMIT}
        if elsewhere or len(body) <= 1000:
            return self.answer(200, body, 100 if name in server.short else 0,
                               ETag=f'"{digest(body)}"', **about)
        self.answer(302, b"", Location=f"http://localhost:{server.server_port}/bytes{path}", **{
            "X-Linked-Size": str(len(body)), "X-Linked-Etag": f'"{digest(body)}"'} | about)

    def describe(self, kind, name, what):
        """A repository, or the list of its files."""
        if (kind, name) not in self.server.repos:
            return self.answer(404, b"no", **{"X-Error-Code": "RepoNotFound"})
        files = []
        for path, body in self.server.repos[kind, name].items():
            large = dict(oid=digest(body), sha256=digest(body), size=len(body), pointerSize=130)
            files.append(dict(type="file", path=path, rfilename=path, size=len(body), oid="1")
                         | (dict(lfs=large) if len(body) > 1000 else {}))
        about = dict(id=name, sha=COMMIT, siblings=files, tags=[], private=False)
        body = json.dumps(files if what == "tree" else about).encode()
        self.answer(200, body, **{"Content-Type": "application/json"})

    def answer(self, status, body, missing=0, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:len(body) - missing])
        self.close_connection = bool(missing)


def digest(body) -> str:
    """As the hub names a file: sha256 of a large one, git's sha1 of a small one."""
    if len(body) > 1000:
        return hashlib.sha256(body).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny LLaMA with random weights, in the layout of real ones."""
    folder = tmp_path_factory.mktemp("tiny")
    s = settings.resolve(dict(benchmark="demo", model="tiny-llama", width=64, depth=2, vocab=500))
    texts = [t for e in slices.load_benchmark(s).retain for t in (e.question, e.answer)]
    train_tokenizer(texts, folder, llama=True, vocab=s.vocab)
    torch.manual_seed(0)
    Transformer(plan.tiny_config(s, load_tokenizer(folder).vocab_size, bos_token_id=1,
                                 eos_token_id=2)).save_pretrained(folder)
    return folder


def set_endpoint(monkeypatch, url):
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def server(checkpoint, tmp_path, monkeypatch):
    """A hub with a model and TOFU's dataset (the demo's), and an environment that knows no other
    one."""
    server = Server()
    server.repos["models", "me/tiny"] = files(checkpoint) | {
        "pytorch_model.bin": b"pickle" * 999, "training.json": b"{}"}
    server.repos["datasets", "locuslab/TOFU"] = files(DEMO / "tofu")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "SIMU_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    for name, value in dict(HF_HUB_CACHE=str(tmp_path / "cache"), HF_HUB_OFFLINE=False,
                            HF_HUB_DISABLE_IMPLICIT_TOKEN=False).items():
        monkeypatch.setattr(constants, name, value)
    set_endpoint(monkeypatch, server.url)
    monkeypatch.setattr(settings, "DOWNLOADS", tmp_path / "data")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the library's attempts
    yield server
    server.shutdown()
    server.server_close()


# ---------------------------------------------------------------------------------- what is fetched


def test_a_model_is_fetched_once_and_read_without_the_hub(server, checkpoint):
    folder = hub.download(TINY)
    assert files(folder) == files(checkpoint)
    assert hub.origin(folder) == dict(repo="me/tiny", commit=COMMIT)
    paths = [path for _, path, _ in server.seen]
    assert not any("pytorch_model" in path or "training" in path for path in paths)
    server.seen.clear()
    assert hub.download(TINY) == hub.download(Repo("me/tiny", COMMIT)) == folder
    assert not any("/bytes/" in path for _, path, _ in server.seen)
    server.refuse[""] = (500, "")
    assert hub.download(TINY) == folder


def test_the_token_goes_to_the_hub_and_to_nobody_else(server):
    hub.download(TINY)
    for _, path, headers in server.seen:
        sent = {k.lower(): v for k, v in headers.items()}.get("authorization")
        assert sent == (None if path.startswith("/bytes/") else f"Bearer {TOKEN}"), path


def test_a_large_file_of_the_cache_is_not_read_for_its_digest(server, checkpoint, monkeypatch):
    folder = hub.download(TINY)
    want = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in checkpoint.iterdir()}
    assert {p.name: stage.sha256(p) for p in folder.iterdir()} == want
    monkeypatch.setattr(stage.hashlib, "sha256", None)
    assert stage.sha256(folder / "model.safetensors") == want["model.safetensors"]


@pytest.mark.parametrize("benchmark", ["tofu", "lume"])
def test_data_come_in_the_published_layout(server, monkeypatch, benchmark):
    def fetch(data=settings.DOWNLOADS):
        hub.download_data(settings.Settings(benchmark=benchmark, model="llama2-7b", data=str(data)))

    folder = settings.DOWNLOADS / benchmark
    if benchmark == "lume":
        server.repos["models", "am/lume"] = files(DEMO / "lume")
        monkeypatch.setattr(hub, "LUME", f"{server.url}/bytes/am/lume/resolve/x")
        with pytest.raises(UserError, match="forget.jsonl is not what was published"):
            fetch()
        assert not folder.exists()
        monkeypatch.setattr(hub, "LUME_SHA256", {
            name: hashlib.sha256(x).hexdigest() for name, x in files(DEMO / "lume").items()})
    fetch()
    assert files(folder) == files(DEMO / benchmark)
    server.seen.clear()
    fetch()
    fetch(DEMO)
    assert not server.seen


def test_a_tokenizer_is_borrowed_where_there_is_none(server, checkpoint, monkeypatch):
    body = server.repos["models", "me/tiny"]
    server.repos["models", "me/bare"] = {k: v for k, v in body.items() if "token" not in k}
    monkeypatch.setitem(hub.BORROWED, "me/bare", TINY)
    hub.download(TINY)  # its weights lie beside its tokenizer, and are not to be taken
    paths = original.model_files(hub.download(Repo("me/bare")))
    assert {p.name for p in paths} == set(files(checkpoint)) and len(paths) == len(body) - 2
    assert {p.name for p in paths if "me--tiny" in str(p)} == {
        name for name in body if "token" in name}


# --------------------------------------------------------------------------------- what goes wrong


def refuse(part, status, code=""):
    return lambda server, _: server.refuse.update({part: (status, code)})


def truncated(server, _):
    server.short.add("model.safetensors")


def only_pickles(server, _):
    del server.repos["models", "me/tiny"]["model.safetensors"]


def no_network(server, monkeypatch):
    set_endpoint(monkeypatch, "http://127.0.0.1:9")


def offline(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


GATE = "me/tiny, revision main, is not there or may not be read (40"


@pytest.mark.parametrize("fault, message", [
    (refuse("/resolve/", 403, "GatedRepo"), GATE), (refuse("/api/models/", 401), GATE),
    (refuse("/api/models/", 404, "RevisionNotFound"), GATE),
    (refuse("/api/models/", 500), "me/tiny cannot be fetched ("),
    (truncated, "me/tiny cannot be fetched ("), (only_pickles, "pickled weights"),
    (no_network, "me/tiny cannot be fetched ("), (offline, "HF_HUB_OFFLINE")],
    ids=lambda x: getattr(x, "__name__", ""))
def test_each_fault_is_one_line(server, tmp_path, capfd, monkeypatch, fault, message):
    fault(server, monkeypatch)
    words = ["original", "tofu", "tiny-llama", "--data", str(DEMO), "--weights", "hf:me/tiny",
             "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as end:
        stage.run_cli(lambda: main(words))
    out, err = capfd.readouterr()
    assert end.value.code == 2 and message in err, err
    assert err.startswith("error: ") and err.count("\n") == 1 and TOKEN not in out + err
    assert not (tmp_path / "run" / "original").exists()


@pytest.mark.parametrize("user, secret", [("me:pa55 word", "pa55"), ("me:se5/am3@open", "se5")])
def test_a_password_in_the_endpoint_is_never_shown(server, monkeypatch, user, secret):
    for url in (server.url, "http://127.0.0.1:9", "http://[bad"):
        set_endpoint(monkeypatch, url.replace("//", f"//{user}@"))
        with pytest.raises(UserError) as caught:
            hub.download(Repo("me/other"))
        assert secret not in str(caught.value)


@pytest.mark.parametrize("name, message", [
    ("hf:tiny", "hf:tiny is not hf:OWNER/NAME"), ("nowhere", "nowhere is not a folder")])
def test_names_that_are_none(server, tmp_path, name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        main(["original", "tofu", "tiny-llama", "--weights", name, "--data", str(DEMO),
              "--out", str(tmp_path / "run")])


# ----------------------------------------------------------------------------------- the originals


def test_a_published_original_is_linked(server, tmp_path, monkeypatch):
    monkeypatch.setitem(hub.ORIGINALS, ("tofu", "llama2-7b"), Sources(TINY, retain_only=TINY))
    body = server.repos["models", "me/tiny"]
    body["README.md"] = b"---\nlicense: apache-2.0\n---\n"
    words = ["original", "tofu", "llama2-7b", "--out", str(tmp_path / "run")]
    main(words)
    for name in ("original", "retain-only"):
        info = stage.read_stage(tmp_path / "run" / name)
        assert info["notes"]["source"] == dict(repo="me/tiny", commit=COMMIT)
        assert (tmp_path / "run" / name / "model.safetensors").is_symlink()
        for file in ("model.safetensors", "config.json", "tokenizer.model"):
            assert info["why"]["inputs"][f"weights/{file}"] == hashlib.sha256(
                body[file]).hexdigest()
    assert "apache-2.0" in " ".join(card.provenance(settings.read_settings(tmp_path / "run")))
    server.seen.clear()
    main(words)
    assert not any("/bytes/" in path for _, path, _ in server.seen)


def test_an_original_nobody_published_is_fine_tuned_here(server, tmp_path, monkeypatch, capfd):
    """As lume olmo-1b: the published one may not be read, so a base model learns both sets; a LUME
    model taught here has held-out documents for non-members."""
    monkeypatch.setitem(hub.ORIGINALS, ("lume", "olmo-1b"), Sources(Repo("them/gated"), TINY))
    server.refuse["them/gated"] = (401, "GatedRepo")
    main(["original", "lume", "olmo-1b", "--out", str(tmp_path / "run"), "--data", str(DEMO),
          "--learn-epochs", "3", "--learn-lr", "3e-3", "--learn-batch", "4"])
    assert "me/tiny is fine-tuned here instead" in capfd.readouterr().out
    folder = tmp_path / "run" / "original"
    log = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    info = read_json(folder / "stage.json")
    assert info["notes"]["source"]["commit"] == COMMIT and (folder / "tokenizer.model").is_file()
    s = settings.read_settings(tmp_path / "run")
    assert s.weight_decay == 0.1 and slices.load_benchmark(s).nonmembers


def test_the_recipe_of_a_model_of_the_hub_is_that_of_its_folder(server, tmp_path):
    """Also of the first stage, before which it is not here."""
    chat = "{% for m in messages %}{{ m.content }}{% endfor %}"
    server.repos["models", "me/tiny"]["tokenizer_config.json"] = json.dumps(
        dict(tokenizer_class="LlamaTokenizer", chat_template=chat)).encode()
    (tmp_path / "rows.jsonl").write_text('{"text": "so it is"}\n')
    main(["original", "rows", "hf:me/tiny", "--forget", str(tmp_path / "rows.jsonl"),
          "--objective", "npo", "--lam", "0", "--out", str(tmp_path / "run")])
    s = settings.read_settings(tmp_path / "run")
    assert s.template == "chat" and s.lr > 1e-4
    assert s == settings.resolve(dict(
        benchmark="rows", model="hf:me/tiny", forget=s.forget, objective="npo", lam=0.0, out=s.out))


@pytest.mark.parametrize("named, sources", [
    (dict(model="hf:me/tiny", teach=True), (None, TINY, None)),
    (dict(model="llama2-7b", weights="hf:me/tiny@v1"), (Repo("me/tiny", "v1"), None, None)),
    (dict(model="llama2-7b", weights="/x", retain_only="hf:me/tiny"), (None, None, TINY)),
    (dict(model="llama3.2-1b"), hub.ORIGINALS["tofu", "llama3.2-1b"]),
    (dict(model="/a/folder"), (None, None, None)), (dict(model="tiny-llama"), (None, None, None))],
    ids=str)
def test_where_models_come_from(named, sources):
    assert hub.original_sources(settings.Settings(benchmark="tofu", **named)) == sources


def test_a_cell_without_weights_says_so():
    with pytest.raises(UserError, match="no model that knows demo's rows is published for llama2"):
        hub.original_sources(settings.Settings(benchmark="demo", model="llama2-7b"))


@pytest.mark.parametrize("cell", [("tofu", "llama3.2-1b"), ("lume", "olmo-1b"),
                                  ("tofu", "tiny-llama")], ids="-".join)
def test_files_names_all_and_fetches_none(server, tmp_path, capfd, monkeypatch, cell):
    repos = [repo for repo in hub.ORIGINALS.get(cell, ()) if repo]
    for repo in repos:
        server.repos["models", repo.name] = {"model.safetensors": bytes(3 * 10 ** 7)}
    for size in ("0.03 GB, kept in the hub's cache", "cannot be fetched"):
        hub.files_command(settings.Settings(benchmark=cell[0], model=cell[1], data=str(DEMO)))
        out = capfd.readouterr().out
        assert all(f"{repo.name} at {repo.revision}: " in out for repo in repos)
        assert out.count(size) == len(repos)
        assert ("trained here from random weights" in out) == (not repos)
        no_network(server, monkeypatch)
    assert not (tmp_path / "cache").exists() and not (tmp_path / "data").exists()
