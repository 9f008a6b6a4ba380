"""Where weights and data come from when a run is given none: the Hugging Face hub and GitHub.

Every file is resumed where it broke off, checked against the size and digest its host names, and
appears under its final name only after that; so does the folder, in `downloads/` beside this file
(or $SIMU_DOWNLOADS). Its `SOURCE` says where it came from: repository, commit, sha256 of each file.
A folder that is whole is never asked for again, so a run stays with the commit it began with.

HF_ENDPOINT, HF_TOKEN and the token of `hf auth login` are respected. Pickles are never fetched.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import stage
from stage import HERE, Settings, UserError

# --------------------------------------------------------------------------------- what is where


@dataclass(frozen=True)
class Source:
    """One repository at one revision. files: name -> bytes as last seen, to name them without the
    network; borrow: where its tokenizer is, if it has none of its own."""

    repo: str
    revision: str = "main"
    files: dict = field(default_factory=dict)
    kind: str = "model"  # or "dataset", or "github"
    borrow: "Source | None" = None


LLAMA_SMALL = {"config.json": 600, "generation_config.json": 180, "special_tokens_map.json": 410,
               "model.safetensors.index.json": 26_800, "tokenizer.json": 1_840_000,
               "tokenizer.model": 499_723, "tokenizer_config.json": 780}
OLMO_SMALL = {"config.json": 610, "generation_config.json": 115, "special_tokens_map.json": 65,
              "tokenizer.json": 2_120_000, "tokenizer_config.json": 5_370}
OLMO_0724 = Source("allenai/OLMo-1B-0724-hf", "d7cbab742d80589e714b1a2d7f838dcd21cbe143", OLMO_SMALL
                   | {"model-00001-of-00002.safetensors": 4_707_000_000,
                      "model-00002-of-00002.safetensors": 412_000_000,
                      "model.safetensors.index.json": 9_250})
# (benchmark, model): an original that is ready, and what is fine-tuned here (simu.RECIPES) where
# there is none or it may not be read. SemEval's checkpoint has no commit known in full.
ORIGINALS = {
    ("tofu", "llama2-7b"): (
        Source("locuslab/tofu_ft_llama2-7b", "8fa500e8f345f1dd9cfe95bb4689878c944c9cbd", LLAMA_SMALL
               | {"model-00001-of-00003.safetensors": 4_940_000_000,
                  "model-00002-of-00003.safetensors": 4_950_000_000,
                  "model-00003-of-00003.safetensors": 3_590_000_000}), None),
    ("tofu", "olmo-1b"): (
        None, Source("allenai/OLMo-1B-hf", "aee7752d9c08ee4775e9b0091426d8410e8f6a89",
                     OLMO_SMALL | {"model.safetensors": 4_707_000_000})),
    ("lume", "olmo-1b"): (
        Source("llmunlearningsemeval2025organization/olmo-1B-model-semeval25-unlearning",
               files=OLMO_0724.files, borrow=OLMO_0724), OLMO_0724),
    ("lume", "llama2-7b"): (
        None, Source("NousResearch/Llama-2-7b-hf", "b3ced1bf8cac12ec77f23961af1bda9f439b8113",
                     LLAMA_SMALL | {"model-00001-of-00002.safetensors": 9_980_000_000,
                                    "model-00002-of-00002.safetensors": 3_500_000_000})),
}
DATA = {
    "tofu": Source("locuslab/TOFU", "324592d84ae4f482ac7249b9285c2ecdb53e3a68", {
        "forget01.json": 11_655, "forget01_perturbed.json": 70_622, "forget05.json": 56_437,
        "forget05_perturbed.json": 334_176, "forget10.json": 114_856,
        "forget10_perturbed.json": 674_694, "full.json": 1_077_844, "real_authors.json": 21_862,
        "real_authors_perturbed.json": 17_146, "retain90.json": 962_987, "retain95.json": 1_021_406,
        "retain99.json": 1_066_188, "retain_perturbed.json": 641_057, "world_facts.json": 23_094,
        "world_facts_perturbed.json": 18_053}, "dataset"),
    "lume": Source("amazon-science/lume-llm-unlearning", "b2fa8f9c567715f1e2c6d442213f33b2e9a28fe6",
                   {"forget.jsonl": 1_039_485, "retain.jsonl": 1_040_496}, "github"),
}
LUME_SHA256 = {  # GitHub names no digests
    "forget.jsonl": "3a74f30223c35b173664dfea5b1c5939587f1eac868a9764891f30c2c317c381",
    "retain.jsonl": "ec8826a91d9fb9e5a50ba732549e8eff75fc99c2f67d6873d1ea36fd403a003d"}
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json",
             "special_tokens_map.json", "added_tokens.json")
WANTED = re.compile(r"(generation_)?config\.json|model[\w.-]*\.safetensors(\.index\.json)?|"
                    + "|".join(map(re.escape, TOKENIZER)))
NAMED = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
TIMEOUT = 10  # seconds for an answer about a repository


class NoAccess(UserError):
    """A repository that is gated, private or not there."""


def downloads() -> Path:
    """The folder that holds everything fetched."""
    return Path(os.environ.get("SIMU_DOWNLOADS") or HERE / "downloads").expanduser().absolute()


def page(source: Source) -> str:
    """Where a person looks at a source."""
    if source.kind == "github":
        return f"https://github.com/{source.repo}"
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{host}/{'datasets/' if source.kind == 'dataset' else ''}{source.repo}"


# ------------------------------------------------------------------------------- asking the host


@dataclass(frozen=True)
class File:
    """digest: sha256 (64 digits), git's sha1 (40), or "" where the host names none."""

    name: str
    size: int
    digest: str
    url: str


def _hub():
    """huggingface_hub, without its warnings: what a person must know, we say."""
    try:
        import huggingface_hub
        from huggingface_hub.utils import logging
    except ImportError:
        raise UserError("downloads need a package: pip install huggingface_hub; or point --data "
                        "(SIMU_DATA) and --weights at folders that are there") from None
    logging.set_verbosity_error()
    return huggingface_hub


def listing(source: Source) -> tuple[str, list[File]]:
    """The commit that a source stands for now, and those of its files that are wanted, the small
    ones first: a gate is met before anything large is fetched."""
    if source.kind == "github":
        base = os.environ.get("SIMU_LUME_URL") or (
            f"https://raw.githubusercontent.com/{source.repo}/{source.revision}/data")
        return source.revision, [File(n, size, LUME_SHA256[n], f"{base}/{n}")
                                 for n, size in source.files.items()]
    hub, endpoint = _hub(), os.environ.get("HF_ENDPOINT")
    try:
        info = hub.HfApi(endpoint=endpoint).repo_info(
            source.repo, revision=source.revision, repo_type=source.kind, timeout=TIMEOUT,
            files_metadata=True)
    except Exception as e:  # the classes differ between the library's versions
        raise _told(e, source) from None
    there = {f.rfilename: f for f in info.siblings}
    names = [n for n in there if (n in source.files if source.kind == "dataset" else
                                  WANTED.fullmatch(n))]
    files = [File(n, there[n].size or 0,
                  (there[n].lfs and there[n].lfs.sha256) or there[n].blob_id or "",
                  hub.hf_hub_url(source.repo, n, repo_type=source.kind, revision=info.sha,
                                 endpoint=endpoint)) for n in names]
    if source.kind == "model" and not any(n.endswith(".safetensors") for n in names):
        raise UserError(f"{page(source)} has no model*.safetensors, and pickled .bin files are not "
                        "read; convert it where you trust it (transformers: from_pretrained, then "
                        "save_pretrained), and pass that folder as --weights DIR")
    if source.borrow and not set(names) & {"tokenizer.json", "tokenizer.model"}:
        files += [f for f in listing(source.borrow)[1] if f.name in TOKENIZER]
    if not files:
        raise UserError(f"{page(source)} has none of the files wanted: {', '.join(source.files)}")
    return info.sha, sorted(files, key=lambda f: f.size)


def _told(e: Exception, source: Source, name: str = "") -> UserError:
    """What a failed request means for the person who waits for it. Never holds the token."""
    where, status = page(source), getattr(getattr(e, "response", None), "status_code", None)
    local = ("pass --weights DIR, a folder in Hugging Face layout" if source.kind == "model" else
             "point --data or SIMU_DATA at a folder that holds the files")
    if status in (401, 403) and source.kind != "github":
        who = "with the token given" if _hub().get_token() else "no token given"
        return NoAccess(f"{where} may not be read ({status}, {who}): ask for access on that page, "
                        "and give a token of your account: HF_TOKEN=... or `hf auth login`")
    if status == 404:
        what = f"{name} of {where}" if name else where
        return NoAccess(f"{what}, revision {source.revision}, is not there, or private (404); look "
                        f"at that page, or {local}")
    if getattr(e, "errno", None) == errno.ENOSPC:
        return UserError(f"the disk of {downloads()} is full; free space, or point SIMU_DOWNLOADS "
                         "at another, and run again: it goes on from there")
    if "Consistency check" in str(e):
        return UserError(f"{name} of {where} broke off before its end; run again: it goes on from "
                         "there")
    if status:
        return UserError(f"{where} answered {status}; run again later, or {local}")
    why = f"{type(e).__name__}: {e}".splitlines()[0]
    if token := _hub().get_token():
        why = why.replace(token, "<token>")
    return UserError(f"{where} cannot be reached ({why}); mend the network or HF_ENDPOINT, or "
                     f"{local}")


# -------------------------------------------------------------------------------------- fetching


def place(source: Source, commit: str) -> Path:
    """Where a source is kept: data as --data wants it, models by commit."""
    if source.kind == "model":
        return downloads() / f"{source.repo.replace('/', '--')}@{commit[:12]}"
    return downloads() / "data" / next(n for n, s in DATA.items() if s.repo == source.repo)


def have(source: Source) -> Path | None:
    """The folder of a source that is already here, whole."""
    like = place(source, 12 * "?")
    for folder in sorted(like.parent.glob(like.name)):
        if (folder / "SOURCE").is_file():
            made = stage.read_json(folder / "SOURCE")
            if made["repo"] == source.repo and source.revision in (made["revision"],
                                                                   made["commit"]):
                return folder
    return None


def download(source: Source) -> Path:
    """The folder of a source; fetched whole first if it is not here."""
    if folder := have(source):
        return folder
    downloads().mkdir(parents=True, exist_ok=True)
    with open(downloads() / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for a process that may be fetching the same
        if folder := have(source):
            return folder
        commit, files = listing(source)
        folder = place(source, commit)
        if folder.exists() and not (folder / "SOURCE").is_file():
            raise UserError(f"{folder} is in the way of a download; move it, or point --data at it")
        partial = folder.with_name(folder.name + ".partial")
        partial.mkdir(parents=True, exist_ok=True)
        _check_room(partial, files)
        print(f"fetching {page(source)} at {commit} into {folder}", flush=True)
        sums = {f.name: _fetch(source, f, partial) for f in files}
        stage.write_json(partial / "SOURCE", dict(repo=source.repo, revision=source.revision,
                                                  commit=commit, sha256=sums))
        shutil.rmtree(folder, ignore_errors=True)  # of an older revision
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


def _fetch(source: Source, file: File, folder: Path) -> str:
    """One file into folder, from where an earlier attempt broke off; returns its sha256."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers
    final, part = folder / file.name, folder / f"{file.name}.incomplete"
    if final.is_file() and (known := _verified(final, file)):
        return known
    headers = {} if source.kind == "github" else build_hf_headers()
    if part.is_file() and part.stat().st_size > file.size:
        part.unlink()
    while True:
        with open(part, "ab") as out:
            start = out.tell()
            try:
                http_get(file.url, out, resume_size=start, expected_size=file.size,
                         headers=headers | {"Accept-Encoding": "identity"},
                         displayed_filename=file.name)
                break
            except Exception as e:  # as above
                if out.tell() <= start:  # nothing came: trying again would not help
                    raise _told(e, source, file.name) from None
    known = _verified(part, file)
    if not known:
        part.unlink()
        raise UserError(f"{file.name} of {page(source)} has another digest than {file.digest}; it "
                        "was thrown away: run again")
    os.replace(part, final)
    return known


def _verified(path: Path, file: File) -> str | None:
    """sha256 of a file if it is what its host says; None if it is not."""
    size, known = path.stat().st_size, stage.sha256(path)
    if len(file.digest) == 40:  # git's: small files, which are not kept as large objects
        given = hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest()
    else:
        given = known
    return known if size == file.size and file.digest in (given, "") else None


# ------------------------------------------------------------------------------ what a run needs


def default_data() -> str:
    """--data where neither it nor SIMU_DATA is given."""
    return str(downloads() / "data")


def wanted_data(s: Settings) -> Source | None:
    """The benchmark's data, if it is to come from its publisher."""
    return DATA.get(s.benchmark) if s.data == default_data() else None


def original_sources(s: Settings) -> tuple[Source | None, Source | None]:
    """A source of the original, and one to fine-tune: the first that may be read is taken."""
    if s.weights.startswith("hf:"):
        if not (named := NAMED.fullmatch(s.weights)):
            raise UserError(f"--weights {s.weights} is not hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
        return Source(named[1], named[2] or "main"), None
    if s.weights or s.tiny:
        return None, None
    return ORIGINALS[s.benchmark, s.model]


def find_original(s: Settings) -> tuple[Path, dict, bool]:
    """Folder of the original or of what is fine-tuned into it, where that came from, and whether
    it is ready. Downloads what is not here."""
    ready, base = original_sources(s)
    if not ready and not base:
        return Path(s.weights).resolve(), {}, True
    if ready and not (base and have(base) and not have(ready)):  # once fallen back, stay there
        try:
            folder = download(ready)
            return folder, stage.read_json(folder / "SOURCE"), True
        except NoAccess as e:
            if not base:
                raise
            print(f"{e}. Meanwhile {base.repo} is fine-tuned here instead.", flush=True)
    folder = download(base)
    return folder, stage.read_json(folder / "SOURCE"), False


def files_command(s: Settings):
    """Print every file a run would fetch, with its size and where it would go. Fetches none."""
    sources = [wanted_data(s), *original_sources(s)]
    if not wanted_data(s):
        print(f"data: {'demo/' if s.benchmark == 'demo' and not s.data else s.data}, on this disk")
    if s.tiny and not s.weights:
        print("original: made here from random weights")
    elif not any(sources[1:]):
        print(f"original: {s.weights}, on this disk")
    elif not sources[1]:
        print("original: nobody published it; it is fine-tuned here from the weights below")
    for number, source in enumerate(filter(None, sources)):
        if number and source is sources[-1] and sources[1]:
            print("\nif that may not be read, this is fetched and fine-tuned instead:")
        _print_files(source)


def _print_files(source: Source):
    if folder := have(source):
        return print(f"\n{page(source)}: already in {folder}")
    try:
        commit, files = listing(source)
        sizes, about = {f.name: f.size for f in files}, " "
    except UserError as e:
        commit, sizes, about = source.revision, source.files, "~"
        print(f"\n{' '.join(str(e).split())}\nas last seen, sizes rounded:", end="")
    print(f"\n{page(source)} at {commit}, to {place(source, commit)}:")
    for file, size in sorted(sizes.items()):
        print(f" {about}{size:>14,} bytes  {file}")
    print(f" {about}{sum(sizes.values()) / 1e9:.2f} GB in {len(sizes)} files; the disk has "
          f"{_free(downloads()) / 1e9:.2f} GB left")
