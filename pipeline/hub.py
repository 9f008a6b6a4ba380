"""Where weights and data come from when a run is given none: the Hugging Face hub and GitHub.

huggingface_hub fetches, retries, checks sizes and room, locks, and keeps every repository in its
cache by commit, where transformers finds it too; HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and
`hf auth login` are its settings. What lies in the cache is used where the hub cannot be reached.
Pickled weights are never fetched.

Ready pairs that need no training: `llama3.2-1b` below; for Llama-2-7b-chat, --weights
hf:open-unlearning/tofu_Llama-2-7b-chat-hf_full --retain-only
hf:open-unlearning/tofu_Llama-2-7b-chat-hf_retain90.
"""

import hashlib
import logging
import os
import re
import shutil
import urllib.request
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import data
from model import UserError
from pipeline import settings
from pipeline.settings import MODELS, Settings
from pipeline.tokenizers import one_line, optional_package


@dataclass(frozen=True)
class Repo:
    """One repository at one revision."""

    name: str
    revision: str = "main"
    kind: str = "model"  # or "dataset"


class Sources(NamedTuple):
    """original: it knows the forget set; base: taught here where there is no original, or none
    that may be read; retain_only: it never saw the forget set."""

    original: Repo | None = None
    base: Repo | None = None
    retain_only: Repo | None = None


OLMO_0724 = Repo("allenai/OLMo-1B-0724-hf", "d7cbab742d80589e714b1a2d7f838dcd21cbe143")
SEMEVAL = Repo("llmunlearningsemeval2025organization/olmo-1B-model-semeval25-unlearning")
SMOLLM2 = Repo("HuggingFaceTB/SmolLM2-135M-Instruct")
ORIGINALS = {  # of (benchmark, model)
    ("tofu", "llama2-7b"): Sources(
        Repo("locuslab/tofu_ft_llama2-7b", "8fa500e8f345f1dd9cfe95bb4689878c944c9cbd")),
    ("tofu", "olmo-1b"): Sources(
        base=Repo("allenai/OLMo-1B-hf", "aee7752d9c08ee4775e9b0091426d8410e8f6a89")),
    ("lume", "olmo-1b"): Sources(SEMEVAL, OLMO_0724),
    ("lume", "llama2-7b"): Sources(
        base=Repo("NousResearch/Llama-2-7b-hf", "b3ced1bf8cac12ec77f23961af1bda9f439b8113")),
    ("tofu", "llama3.2-1b"): Sources(
        Repo("open-unlearning/tofu_Llama-3.2-1B-Instruct_full",
             "88e31200b97e4c0c04ae0d2f0b591f427046d192"),
        retain_only=Repo("open-unlearning/tofu_Llama-3.2-1B-Instruct_retain90",
                         "7114300c0049527a71833f5683965c358ad9dcbf")),
    ("tofu", "smollm2-135m"): Sources(base=SMOLLM2),
    ("lume", "smollm2-135m"): Sources(base=SMOLLM2),
}
BORROWED = {SEMEVAL.name: OLMO_0724}  # a repository without tokenizer -> whose it takes
TOFU = Repo("locuslab/TOFU", "324592d84ae4f482ac7249b9285c2ecdb53e3a68", "dataset")
LUME = ("https://raw.githubusercontent.com/amazon-science/lume-llm-unlearning/"
        "b2fa8f9c567715f1e2c6d442213f33b2e9a28fe6/data")
LUME_SHA256 = {
    "forget.jsonl": "3a74f30223c35b173664dfea5b1c5939587f1eac868a9764891f30c2c317c381",
    "retain.jsonl": "ec8826a91d9fb9e5a50ba732549e8eff75fc99c2f67d6873d1ea36fd403a003d"}
FILES = {"dataset": ["*.json"],
         "model": ["config.json", "generation_config.json", "adapter_config.json", "README.md",
                   "model*.safetensors", "model*.safetensors.index.json", *data.TOKENIZER_FILES]}
HF_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


class NoAccess(UserError):
    """A repository that is gated, private or missing."""


# ---------------------------------------------------------------------------------------- fetching


def ask_hub(repo: Repo, function: str, **options):
    """A function of huggingface_hub, called for a repository. UserError: what went wrong, in one
    line that holds neither a token nor the password of an endpoint or a proxy."""
    hub = optional_package("huggingface_hub", "downloads")
    call = getattr(hub.HfApi(), function)  # which imports, and sets the level of messages
    logging.getLogger("huggingface_hub").setLevel("ERROR")  # what it warns of, ours say
    try:
        return call(repo.name, revision=repo.revision, repo_type=repo.kind, **options)
    except Exception as e:  # the classes differ between the library's versions
        answers = [getattr(x, "response", None) for x in (e, e.__cause__)]
        status = next((x.status_code for x in answers if x is not None), None)
        why = one_line(e).replace(hub.get_token() or "\0", "<token>")
        host = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        if "@" in host + why:  # what stands before it may be a password
            why = type(e).__name__
    datasets = "datasets/" if repo.kind == "dataset" else ""
    page = f"{re.sub('//.*@', '//', host)}/{datasets}{repo.name}"
    if status in (401, 403, 404):
        raise NoAccess(f"{page}, revision {repo.revision}, is not there or may not be read "
                       f"({status}): ask for access on that page, and give a token of your "
                       "account: HF_TOKEN=... or `hf auth login`; or give a folder")
    raise UserError(f"{page} cannot be fetched ({why}); run again, which keeps the files that have "
                    "arrived; or give a folder: --weights, --data")


def download(repo: Repo, files=None) -> Path:
    """The folder of a repository in the hub's cache; what is missing of it is fetched."""
    return Path(ask_hub(repo, "snapshot_download", allow_patterns=files or FILES[repo.kind]))


def origin(folder: Path) -> dict:
    """Where a model's folder is from: a repository and its commit, or a folder of that name."""
    cache, commit = folder.parent.parent.name, folder.name
    if folder.parent.name == "snapshots" and cache.startswith("models--"):
        return dict(repo=cache.removeprefix("models--").replace("--", "/"), commit=commit)
    return dict(folder=folder.name)


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of a model's folder is."""
    repo = BORROWED.get(origin(folder).get("repo"))
    return download(repo, data.TOKENIZER_FILES) if repo else folder


def download_data(s: Settings):
    """Put a benchmark's published files where a run that is given none looks for them."""
    folder = settings.DOWNLOADS / s.layout
    if s.data != str(settings.DOWNLOADS) or folder.is_dir():
        return
    partial = folder.with_name(f".{s.layout}.simu-partial")
    shutil.rmtree(partial, ignore_errors=True)  # a killed process left it
    if s.benchmark == "tofu":
        shutil.copytree(download(TOFU), partial)
    else:
        partial.mkdir(parents=True)
        for name in LUME_SHA256:
            (partial / name).write_bytes(fetch_lume(name))
    os.replace(partial, folder)


def fetch_lume(name: str) -> bytes:
    url = f"{LUME}/{name}"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            content = answer.read(1 << 24)  # the files have 1 MB
    except OSError as e:
        raise UserError(f"{url} cannot be fetched ({one_line(e)}); give a folder: --data") from None
    if hashlib.sha256(content).hexdigest() != LUME_SHA256[name]:
        raise UserError(f"{url} is not what was published (its sha256 differs); give a folder: "
                        "--data")
    return content


# ------------------------------------------------------------------------------ what a run needs


def chosen_model(s: Settings) -> str:
    """The folder or hf: name of a model that is not of the table; "" for one of the table."""
    return s.weights or ("" if s.model in MODELS else s.model)


def repo_of(name: str) -> Repo | None:
    """The repository that hf:OWNER/NAME[@REVISION] names; None for a folder."""
    if not name.startswith("hf:"):
        return None
    if not (parts := HF_NAME.fullmatch(name)):
        raise UserError(f"{name} is not hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    return Repo(parts[1], parts[2] or "main")


def original_sources(s: Settings) -> Sources:
    """Where a run's models come from, but for those that are folders or trained here."""
    if name := chosen_model(s):
        repo = repo_of(name)
        sources = Sources(base=repo) if s.teach else Sources(repo)
    elif s.tiny:
        sources = Sources()
    elif (s.benchmark, s.model) in ORIGINALS:
        sources = ORIGINALS[s.benchmark, s.model]
    else:
        raise UserError(f"no model that knows {s.benchmark}'s rows is published for {s.model}; "
                        "pass --weights")
    if s.retain_only:
        sources = sources._replace(retain_only=repo_of(s.retain_only))
    return sources


def find_original(s: Settings) -> tuple[Path, bool]:
    """The folder of the original, or of what is taught to become it; and whether it is ready."""
    original, base, _ = original_sources(s)
    if not original and not base:
        return Path(chosen_model(s)).resolve(), not s.teach
    if original:
        try:
            return download(original), True
        except NoAccess as e:
            if not base:
                raise
            print(f"{e}. Meanwhile {base.name} is fine-tuned here instead.", flush=True)
    return download(base), False


def find_retain_only(s: Settings) -> Path | None:
    """The folder of a model that never saw the forget set, if one is published or chosen."""
    if repo := original_sources(s).retain_only:
        return download(repo)
    return Path(s.retain_only).resolve() if s.retain_only else None


def files_command(s: Settings):
    """Print what a run would fetch, with its size. Fetches nothing."""
    repos = {name: repo for name, repo in original_sources(s)._asdict().items() if repo}
    if s.data == str(settings.DOWNLOADS) and s.benchmark == "tofu":
        repos["data"] = TOFU
    for name, repo in repos.items():
        try:
            files = ask_hub(repo, "repo_info", files_metadata=True).siblings
            size = sum(f.size or 0 for f in files
                       if any(fnmatch(f.rfilename, pattern) for pattern in FILES[repo.kind]))
            what = f"{size / 1e9:.2f} GB, kept in the hub's cache (HF_HOME)"
        except UserError as e:
            what = str(e)
        print(f"{name}: {repo.name} at {repo.revision}: {what}")
    if not {"original", "base"} & set(repos):
        print(f"original: {chosen_model(s) or 'trained here from random weights'}")
