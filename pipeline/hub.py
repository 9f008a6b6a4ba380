"""Where weights and data come from when a run is given none: the Hugging Face hub and GitHub.

Every file goes on where it broke off, is checked against the size and digest that its host names,
and appears under its final name only after that; so does its folder, in downloads/ beside run.sh
(or $SIMU_DOWNLOADS). Its SOURCE says where it came from: repository, commit, sha256 of each file.
A folder that is whole is never asked for again, so a run stays with the commit it began with; one
that was altered since is refused. huggingface_hub lists, fetches and retries; its snapshot_download
would not do: it compares no digest, takes any length, and keeps nothing of a killed download (2.4).

Ready pairs that need no training: `llama3.2-1b` below; for Llama-2-7b-chat, --weights
hf:open-unlearning/tofu_Llama-2-7b-chat-hf_full --retain-only
hf:open-unlearning/tofu_Llama-2-7b-chat-hf_retain90.

HF_ENDPOINT, HF_TOKEN and the token of `hf auth login` are respected. Pickles are never fetched.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import data
from model import UserError, read_json, write_json
from pipeline.checkpoint import weight_files
from pipeline.settings import MODELS, Settings, default_data, downloads
from pipeline.stage import fcntl, sha256
from pipeline.tokenizers import one_line

# --------------------------------------------------------------------------------- what is where


@dataclass(frozen=True)
class Repo:
    """One repository at one revision. files: name -> bytes as last seen, to name them without the
    network; borrow: where its tokenizer is, if it has none of its own."""

    name: str
    revision: str = "main"
    files: dict = field(default_factory=dict)
    kind: str = "model"  # or "dataset", or "github"
    borrow: "Repo | None" = None


class Sources(NamedTuple):
    """original: it knows the forget set; base: taught here where there is no original, or none
    that may be read; retain_only: it never saw the forget set."""

    original: Repo | None = None
    base: Repo | None = None
    retain_only: Repo | None = None


LLAMA2_SMALL = {"config.json": 600, "generation_config.json": 180, "special_tokens_map.json": 410,
                "model.safetensors.index.json": 26_800, "tokenizer.json": 1_840_000,
                "tokenizer.model": 499_723, "tokenizer_config.json": 780}
LLAMA3_1B = {"config.json": 900, "generation_config.json": 190, "special_tokens_map.json": 300,
             "tokenizer.json": 17_210_000, "tokenizer_config.json": 54_500,
             "model.safetensors": 2_471_600_000}
OLMO_SMALL = {"config.json": 610, "generation_config.json": 115, "special_tokens_map.json": 65,
              "tokenizer.json": 2_120_000, "tokenizer_config.json": 5_370}
OLMO_0724 = Repo("allenai/OLMo-1B-0724-hf", "d7cbab742d80589e714b1a2d7f838dcd21cbe143", OLMO_SMALL
                 | {"model-00001-of-00002.safetensors": 4_707_000_000,
                    "model-00002-of-00002.safetensors": 412_000_000,
                    "model.safetensors.index.json": 9_250})
SMOLLM2 = Repo("HuggingFaceTB/SmolLM2-135M-Instruct", files={  # no commit known in full
    "config.json": 860, "generation_config.json": 130, "special_tokens_map.json": 650,
    "tokenizer.json": 2_100_000, "tokenizer_config.json": 3_760, "model.safetensors": 269_060_000})
# (benchmark, model) of the table. SemEval's checkpoint has no commit known in full.
ORIGINALS = {
    ("tofu", "llama2-7b"): Sources(
        Repo("locuslab/tofu_ft_llama2-7b", "8fa500e8f345f1dd9cfe95bb4689878c944c9cbd", LLAMA2_SMALL
             | {"model-00001-of-00003.safetensors": 4_940_000_000,
                "model-00002-of-00003.safetensors": 4_950_000_000,
                "model-00003-of-00003.safetensors": 3_590_000_000})),
    ("tofu", "olmo-1b"): Sources(
        base=Repo("allenai/OLMo-1B-hf", "aee7752d9c08ee4775e9b0091426d8410e8f6a89",
                  OLMO_SMALL | {"model.safetensors": 4_707_000_000})),
    ("lume", "olmo-1b"): Sources(
        Repo("llmunlearningsemeval2025organization/olmo-1B-model-semeval25-unlearning",
             files=OLMO_0724.files, borrow=OLMO_0724), OLMO_0724),
    ("lume", "llama2-7b"): Sources(
        base=Repo("NousResearch/Llama-2-7b-hf", "b3ced1bf8cac12ec77f23961af1bda9f439b8113",
                  LLAMA2_SMALL | {"model-00001-of-00002.safetensors": 9_980_000_000,
                                  "model-00002-of-00002.safetensors": 3_500_000_000})),
    ("tofu", "llama3.2-1b"): Sources(
        Repo("open-unlearning/tofu_Llama-3.2-1B-Instruct_full",
             "88e31200b97e4c0c04ae0d2f0b591f427046d192", LLAMA3_1B),
        retain_only=Repo("open-unlearning/tofu_Llama-3.2-1B-Instruct_retain90",
                         "7114300c0049527a71833f5683965c358ad9dcbf", LLAMA3_1B)),
    ("tofu", "smollm2-135m"): Sources(base=SMOLLM2),
    ("lume", "smollm2-135m"): Sources(base=SMOLLM2),
}
DATA = {
    "tofu": Repo("locuslab/TOFU", "324592d84ae4f482ac7249b9285c2ecdb53e3a68", {
        "forget01.json": 11_655, "forget01_perturbed.json": 70_622, "forget05.json": 56_437,
        "forget05_perturbed.json": 334_176, "forget10.json": 114_856,
        "forget10_perturbed.json": 674_694, "full.json": 1_077_844, "real_authors.json": 21_862,
        "real_authors_perturbed.json": 17_146, "retain90.json": 962_987, "retain95.json": 1_021_406,
        "retain99.json": 1_066_188, "retain_perturbed.json": 641_057, "world_facts.json": 23_094,
        "world_facts_perturbed.json": 18_053}, "dataset"),
    "lume": Repo("amazon-science/lume-llm-unlearning", "b2fa8f9c567715f1e2c6d442213f33b2e9a28fe6",
                 {"forget.jsonl": 1_039_485, "retain.jsonl": 1_040_496}, "github"),
}
LUME_SHA256 = {  # GitHub names no digests
    "forget.jsonl": "3a74f30223c35b173664dfea5b1c5939587f1eac868a9764891f30c2c317c381",
    "retain.jsonl": "ec8826a91d9fb9e5a50ba732549e8eff75fc99c2f67d6873d1ea36fd403a003d"}
WANTED = re.compile(r"(generation_)?config\.json|model[\w.-]*\.safetensors(\.index\.json)?|"
                    + "|".join(map(re.escape, data.TOKENIZER_FILES)))
TOKENIZERS = {"tokenizer.json", "tokenizer.model"}  # either will do
HF_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
COMMIT = re.compile("[0-9a-f]{40}")
TIMEOUT = 10  # seconds for an answer about a repository


class NoAccess(UserError):
    """A repository that is gated, private or not there."""


def page(repo: Repo) -> str:
    """Where a person looks at a repository. Never holds the password an endpoint may have."""
    if repo.kind == "github":
        return f"https://github.com/{repo.name}"
    host = re.sub("//.*@", "//", os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    return f"{host.rstrip('/')}/{'datasets/' if repo.kind == 'dataset' else ''}{repo.name}"


# ------------------------------------------------------------------------------- asking the host


@dataclass(frozen=True)
class File:
    """digest: sha256 (64 digits), git's sha1 (40), or "" where the host names none."""

    name: str
    size: int
    digest: str
    url: str


def _hub():
    """huggingface_hub, without its warnings: what a person must know, our messages say."""
    try:
        import huggingface_hub
        from huggingface_hub.utils import logging
    except ImportError:
        raise UserError("downloads need a package: pip install huggingface_hub; or point --data "
                        "(SIMU_DATA) and --weights at folders that are there") from None
    logging.set_verbosity_error()
    return huggingface_hub


def listing(repo: Repo) -> tuple[str, list[File]]:
    """The commit that a repository stands at now, and those of its files that are wanted, the small
    ones first: a gate is met before anything large is fetched."""
    if repo.kind == "github":
        base = os.environ.get("SIMU_LUME_URL") or (
            f"https://raw.githubusercontent.com/{repo.name}/{repo.revision}/data")
        return repo.revision, [File(n, size, LUME_SHA256[n], f"{base}/{n}")
                               for n, size in repo.files.items()]
    commit, files = _ask(repo)
    names = {f.name for f in files}
    if repo.kind == "model" and not any(n.endswith(".safetensors") for n in names):
        raise UserError(f"{page(repo)} has no model*.safetensors, and pickled .bin files are not "
                        "read; convert it where you trust it (transformers: from_pretrained, then "
                        "save_pretrained), and pass that folder as --weights DIR")
    if repo.borrow and not names & TOKENIZERS:
        files += [f for f in listing(repo.borrow)[1] if f.name in data.TOKENIZER_FILES]
    elif repo.kind == "model" and not is_whole(repo, names):
        raise UserError(f"{page(repo)} lacks config.json or a tokenizer (tokenizer.json, "
                        "tokenizer.model); choose a repository that is whole, or --weights DIR")
    if not files:
        raise UserError(f"{page(repo)} has none of the files wanted: {', '.join(repo.files)}")
    return commit, sorted(files, key=lambda f: f.size)


def _ask(repo: Repo) -> tuple[str, list[File]]:
    """What the hub answers about a repository, with every part that is used checked: its types, and
    that the commit, which becomes part of a path, is one."""
    hub, endpoint = _hub(), os.environ.get("HF_ENDPOINT") or None
    try:
        info = hub.HfApi(endpoint=endpoint).repo_info(
            repo.name, revision=repo.revision, repo_type=repo.kind, timeout=TIMEOUT,
            files_metadata=True)
    except Exception as e:  # the classes differ between the library's versions
        raise _failure(e, repo) from None
    try:
        if not COMMIT.fullmatch(info.sha):
            raise ValueError(f"commit {info.sha!r}")
        files = []
        for f in info.siblings:
            if f.rfilename in repo.files if repo.kind == "dataset" else WANTED.fullmatch(
                    f.rfilename):
                digest = (f.lfs and f.lfs.sha256) or f.blob_id or ""
                if type(f.size) is not int or f.size < 0 or not re.fullmatch(
                        "([0-9a-f]{40}|[0-9a-f]{64})?", digest):
                    raise ValueError(f"{f.rfilename}: size {f.size!r}, digest {digest!r}")
                url = hub.hf_hub_url(repo.name, f.rfilename, repo_type=repo.kind,
                                     revision=info.sha, endpoint=endpoint)
                files.append(File(f.rfilename, f.size, digest, url))
    except (TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{page(repo)} is described in a way that is not understood "
                        f"({one_line(e)}); check HF_ENDPOINT, or update "
                        "huggingface_hub") from None
    return info.sha, files


def _failure(e: Exception, repo: Repo, name: str = "") -> UserError:
    """What a failed request means for the person who waits for it. Never holds a secret."""
    where, status = page(repo), getattr(getattr(e, "response", None), "status_code", None)
    local = ("pass --weights DIR, a folder in Hugging Face layout" if repo.kind == "model" else
             "point --data or SIMU_DATA at a folder that holds the files")
    if status in (401, 403) and repo.kind != "github":
        who = "with the token given" if _hub().get_token() else "no token given"
        return NoAccess(f"{where} may not be read ({status}, {who}): ask for access on that page, "
                        "and give a token of your account: HF_TOKEN=... or `hf auth login`")
    if status == 404:
        what = f"{name} of {where}" if name else where
        return NoAccess(f"{what}, revision {repo.revision}, is not there, or private (404); look "
                        f"at that page, or {local}")
    if getattr(e, "errno", None) == errno.ENOSPC:
        return UserError(f"the disk of {downloads()} is full; free space, or point SIMU_DOWNLOADS "
                         "at another, and run again: it goes on from there")
    if "Consistency check" in str(e):
        return UserError(f"{name} of {where} broke off before its end; run again: it goes on from "
                         "there")
    if status:
        return UserError(f"{where} answered {status}; run again later, or {local}")
    why = type(e).__name__
    if "@" not in os.environ.get("HF_ENDPOINT", ""):  # else the message may quote a password
        why = re.sub(r"//[^/\s]*@", "//", f"{why}: {e}".splitlines()[0])  # a proxy's
    if token := _hub().get_token():
        why = why.replace(token, "<token>")
    return UserError(f"{where} cannot be reached ({why}); mend the network or HF_ENDPOINT, or "
                     f"{local}")


# -------------------------------------------------------------------------------------- fetching


def place(repo: Repo, commit: str) -> Path:
    """Where a repository is kept: data as --data wants it, models by commit."""
    if repo.kind == "model":
        return downloads() / f"{repo.name.replace('/', '--')}@{commit[:12]}"
    return downloads() / "data" / next(n for n, r in DATA.items() if r.name == repo.name)


def changed_file(file: Path, size: int, sha: str, when: int) -> bool:
    """Does a file hold other bytes than were fetched?"""
    now = file.stat()
    return now.st_size != size or now.st_mtime_ns != when and sha256(file) != sha


@contextlib.contextmanager
def turn(folder: Path):
    """Wait for other processes that have their turn in a folder. Nothing is left there; where the
    system or its disk knows no locks, nobody waits."""
    file = None
    try:
        with contextlib.suppress(OSError):
            if fcntl:
                file = os.open(folder, os.O_RDONLY)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        if file is not None:
            os.close(file)


def read_source(folder: Path) -> dict:
    """SOURCE of a downloaded folder: repo, revision, commit, sha256 and files. UserError if one of
    the files was altered since, or removed."""
    path, again = folder / "SOURCE", f"move or delete {folder}, to fetch it again"
    made = read_json(path)
    sums = made.get("sha256") if isinstance(made, dict) else None
    if not isinstance(sums, dict) or not all(isinstance(x, str) for x in (
            *sums.values(), *(made.get(k) for k in ("repo", "revision", "commit")))):
        raise UserError(f"{path} does not say where that folder came from; {again}")
    sealed = made.get("files") if isinstance(made.get("files"), dict) else {}
    for name, sha in sums.items():
        file, sealed_as = folder / name, sealed.get(name)
        if not file.is_file():
            raise UserError(f"{file} is gone; {again}")
        if not isinstance(sealed_as, list) or [type(x) for x in sealed_as] != [int, str, int]:
            sealed_as = file.stat().st_size, sha, 0  # an earlier version's SOURCE has no seals
        if sealed_as[1] != sha or changed_file(file, *sealed_as):
            raise UserError(f"{file} is not what was fetched; {again}")
    return made


def is_whole(repo: Repo, names: set[str]) -> bool:
    """Are all files that a run will read among these?"""
    if repo.kind == "model":
        return "config.json" in names and bool(names & TOKENIZERS)
    return set(repo.files) <= names


def have(repo: Repo) -> Path | None:
    """The folder of a repository that is already here, with all its files."""
    like = place(repo, 12 * "?")
    for folder in sorted(like.parent.glob(like.name)):
        if (folder / "SOURCE").is_file():
            made = read_source(folder)
            if (is_whole(repo, set(made["sha256"])) and made["repo"] == repo.name
                    and repo.revision in (made["revision"], made["commit"])):
                return folder
    return None


def download(repo: Repo) -> Path:
    """The folder of a repository; fetched whole first if it is not here. Data of which the
    publisher lacks a file are used as they are, until the publisher has it."""
    if folder := have(repo):
        return folder
    downloads().mkdir(parents=True, exist_ok=True)
    with turn(downloads()):  # another process may be fetching the same
        if folder := have(repo):
            return folder
        partly = place(repo, "")  # for data: a model without all its files is never kept
        here = read_source(partly) if (partly / "SOURCE").is_file() else {}
        try:
            commit, files = listing(repo)
        except UserError:
            if here.get("revision") == repo.revision:
                return partly
            raise
        if here and {f.name for f in files} <= set(here["sha256"]):
            return partly
        return _fetch_all(repo, commit, files)


def _fetch_all(repo: Repo, commit: str, files: list[File]) -> Path:
    folder = place(repo, commit)
    if folder.exists() and not (folder / "SOURCE").is_file():
        raise UserError(f"{folder} is in the way of a download; move it, or point --data at it")
    partial = folder.with_name(f".{folder.name}.simu-partial")
    if partial.is_symlink():
        raise UserError(f"{partial} is a link; delete it")
    partial.mkdir(parents=True, exist_ok=True)
    _check_room(partial, files)
    print(f"fetching {page(repo)} at {commit} into {folder}", flush=True)
    sums = {f.name: _fetch(repo, f, partial) for f in files}
    if repo.kind == "model":
        weight_files(partial)  # UserError if the repository lacks a part that its index names
    about = {name: (partial / name).stat() for name in sums}
    seals = {name: [x.st_size, sums[name], x.st_mtime_ns] for name, x in about.items()}
    write_json(partial / "SOURCE", dict(repo=repo.name, revision=repo.revision, commit=commit,
                                        sha256=sums, files=seals))
    if folder.exists():  # of an older revision
        old = read_source(folder)["sha256"]
        if others := {p.name for p in folder.iterdir()} - set(old) - {"SOURCE"}:
            raise UserError(f"{folder} is to be replaced, and holds {sorted(others)[0]}, which was "
                            "not fetched; move that elsewhere")
        shutil.rmtree(folder)
    os.replace(partial, folder)
    return folder


def _check_room(folder: Path, files: list[File]):
    missing = sum(f.size for f in files) - sum(p.stat().st_size for p in folder.iterdir())
    if missing > _free(folder):
        raise UserError(f"{missing / 1e9:.2f} GB are to be fetched and the disk of {folder} has "
                        f"{_free(folder) / 1e9:.2f} GB left; free space, or point SIMU_DOWNLOADS "
                        "at another")


def _free(folder: Path) -> int:
    """Bytes left on the disk that a folder is or would be on."""
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.is_dir())).free


class TooLong(Exception):
    """A host sends more than it promised."""


def _bounded(out, size: int) -> SimpleNamespace:
    """A file to write to that takes `size` bytes, however many a host sends."""
    def write(block):
        if out.tell() + len(block) > size:
            raise TooLong
        return out.write(block)
    return SimpleNamespace(write=write, tell=out.tell, seek=out.seek, truncate=out.truncate)


def _fetch(repo: Repo, file: File, folder: Path) -> str:
    """One file into folder, from where an earlier attempt broke off; returns its sha256."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers
    final, part = folder / file.name, folder / f"{file.name}.incomplete"
    for path in (final, part):  # a pipe would wait for ever, a link lead elsewhere
        if path.is_symlink() or path.exists() and not path.is_file():
            raise UserError(f"{path} is not a plain file; delete it")
    if final.is_file() and (known := _verified(final, file)):
        return known
    if part.is_file() and part.stat().st_size > file.size:
        part.unlink()
    headers = {} if repo.kind == "github" else build_hf_headers()
    with open(part, "ab") as out:
        try:
            http_get(file.url, _bounded(out, file.size), resume_size=out.tell(),
                     expected_size=file.size, displayed_filename=file.name,
                     headers=headers | {"Accept-Encoding": "identity"})
        except TooLong:
            raise _thrown_away(part, file, repo, f"is longer than {file.size} bytes") from None
        except Exception as e:  # as in _ask
            raise _failure(e, repo, file.name) from None
    known = _verified(part, file)
    if not known:
        raise _thrown_away(part, file, repo, f"has another digest than {file.digest}")
    os.replace(part, final)
    return known


def _thrown_away(part: Path, file: File, repo: Repo, why: str) -> UserError:
    part.unlink()
    return UserError(f"{file.name} of {page(repo)} {why}; it was thrown away: run again")


def _verified(path: Path, file: File) -> str | None:
    """sha256 of a file if it is what its host says; None if it is not."""
    size, known = path.stat().st_size, sha256(path)
    if size != file.size:
        return None
    if len(file.digest) == 40:  # git's: small files, which are not kept as large objects
        git = hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest()
        return known if git == file.digest else None
    return known if file.digest in (known, "") else None


# ------------------------------------------------------------------------------ what a run needs


def wanted_data(s: Settings) -> Repo | None:
    """The benchmark's data, if it is to come from its publisher."""
    return DATA.get(s.benchmark) if s.data == default_data() else None


def repo_of(given: str, flag: str) -> Repo | None:
    """The repository that hf:OWNER/NAME[@REVISION] names; None for a folder."""
    if not given.startswith("hf:"):
        return None
    if not (named := HF_NAME.fullmatch(given)):
        raise UserError(f"{flag} {given} is not hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    return Repo(named[1], named[2] or "main")


def original_sources(s: Settings) -> Sources:
    """Where a run's models come from, but for those that are folders or made here."""
    if given := given_model(s):
        repo = repo_of(given, "--weights" if s.weights else "MODEL")
        sources = Sources(base=repo) if s.teach else Sources(repo)
    elif s.tiny:
        sources = Sources()
    elif (s.benchmark, s.model) in ORIGINALS:
        sources = ORIGINALS[s.benchmark, s.model]
    else:
        raise UserError(f"no model that knows {s.benchmark}'s rows is published for {s.model}; "
                        "pass --weights")
    if s.retain_only:
        sources = sources._replace(retain_only=repo_of(s.retain_only, "--retain-only"))
    return sources


def given_model(s: Settings) -> str:
    """The folder or hf: name of a model of the user's own; "" for one of the table."""
    return s.weights or ("" if s.model in MODELS else s.model)


def find_original(s: Settings) -> tuple[Path, dict, bool]:
    """Folder of the original or of what is taught to become it, where that came from (SOURCE), and
    whether it is ready. Downloads what is not here."""
    original, base, _ = original_sources(s)
    if not original and not base:
        folder, ready = Path(given_model(s)).resolve(), not s.teach
        files = [] if ready or not folder.is_dir() else [p for p in folder.iterdir() if p.is_file()]
        return folder, {} if ready else dict(sha256={p.name: sha256(p) for p in files}), ready
    if original and not (base and have(base) and not have(original)):  # fallen back: stay there
        try:
            folder = download(original)
            return folder, read_source(folder), True
        except NoAccess as e:
            if not base:
                raise
            print(f"{e}. Meanwhile {base.name} is fine-tuned here instead.", flush=True)
    folder = download(base)
    return folder, read_source(folder), False


def find_retain_only(s: Settings) -> tuple[Path, dict] | None:
    """Folder of a model that never saw the forget set, and its SOURCE; None if the run has none
    that is published or given."""
    if not (repo := original_sources(s).retain_only):
        return (Path(s.retain_only).resolve(), {}) if s.retain_only else None
    folder = download(repo)
    return folder, read_source(folder)


def files_command(s: Settings):
    """Print every file a run would fetch, with its size and where it would go. Fetches none."""
    source, (original, base, retain_only) = wanted_data(s), original_sources(s)
    if source:
        _print_files(source)
    else:
        where = "pipeline/demo/" if s.benchmark == "demo" and not s.data else s.data
        print(f"data: {where or 'files of your own'}, on this disk")
    if original:
        _print_files(original)
    elif not base:
        print(f"original: {given_model(s)}, on this disk" if given_model(s) else
              "original: made here from random weights")
    if base:
        print("\nif that may not be read, this is fetched and fine-tuned instead:" if original else
              "original: nobody published it; it is fine-tuned here from the weights below")
        _print_files(base)
    if retain_only:
        print("\nretain-only, the model that never saw the forget set:", end="")
        _print_files(retain_only)


def _print_files(repo: Repo):
    if folder := have(repo):
        return print(f"\n{page(repo)}: already in {folder}")
    try:
        commit, files = listing(repo)
        sizes, about = {f.name: f.size for f in files}, " "
    except UserError as e:
        commit, sizes, about = repo.revision, repo.files, "~"
        print(f"\n{' '.join(str(e).split())}\nas last seen, sizes rounded:", end="")
    print(f"\n{page(repo)} at {commit}, to {place(repo, commit)}:")
    for file, size in sorted(sizes.items()):
        print(f" {about}{size:>14,} bytes  {file}")
    print(f" {about}{sum(sizes.values()) / 1e9:.2f} GB in {len(sizes)} files; the disk has "
          f"{_free(downloads()) / 1e9:.2f} GB left")
