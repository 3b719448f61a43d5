"""GPT-2's own tokenizer files: from a folder, or fetched once, checked and kept."""

import contextlib
import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

from groundup.errors import DataError
from groundup.tokenizer.tokenizer import Tokenizer, from_gpt2_files

# OpenAI's release; the hashes are those that tiktoken checks too (tiktoken_ext/openai_public.py).
BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
HUGGING_FACE_NAMES = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}


def gpt2_tokenizer(folder: Path, base_url: str = BASE_URL) -> Tokenizer:
    """
    GPT-2's tokenizer from ``folder``, under OpenAI's or Hugging Face's file names; fetched into it where absent.

    Raises:
        DataError: a file cannot be fetched, or is not OpenAI's.
    """
    paths = {}
    for name, sha256 in FILES.items():
        renamed = folder / HUGGING_FACE_NAMES[name]
        paths[name] = renamed if renamed.is_file() else folder / name
        if not paths[name].is_file():
            _fetch(base_url + name, paths[name], folder)
        if hashlib.sha256(paths[name].read_bytes()).hexdigest() != sha256:
            raise DataError(
                f"tokenizer gpt2: {paths[name]} is not OpenAI's file (its sha256 is not {sha256[:12]}…); delete it and "
                "run again, or give --tokenizer the folder of the tokenizer that you mean"
            )
    return from_gpt2_files(paths["encoder.json"], paths["vocab.bpe"])


def _fetch(url: str, target: Path, folder: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response:
            temporary.write_bytes(response.read())
        os.replace(temporary, target)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"tokenizer gpt2: cannot fetch {url} ({error}); offline, put OpenAI's encoder.json and vocab.bpe (or Hugging "
            f"Face's vocab.json and merges.txt) into {folder}, or give --tokenizer a folder that holds them"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
