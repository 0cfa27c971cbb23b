"""Where the folder of a Hugging Face checkpoint is: here, or on the Hub, from which it is then downloaded. No JAX."""

import os
import re

from jaxlm.errors import UserError

REPOSITORY = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
WANTED = ("*.json", "*.jinja", "*.safetensors", "tokenizer.model", "merges.txt", "vocab.txt")  # no pickles, no code
UNWANTED = ("*/*",)  # the same weights again, in other forms


def local_folder(name: str) -> str:
    """`name` itself, if there is such a folder or it cannot be a repository; else that of the repository `org/name` or
    `org/name@revision`, in the cache of `huggingface_hub`. A local folder never touches the network.

    Raises UserError: `huggingface_hub` is not installed, no network, or no such repository for this user.
    """
    match = REPOSITORY.fullmatch(name)
    if os.path.exists(name) or not match:
        return name
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise UserError(f"{name}: no such folder; if it is a repository of the Hugging Face Hub, pip install 'jaxlm[hub]', or "
                        "download it first and give its folder") from None
    try:
        return snapshot_download(match["name"], revision=match["revision"], allow_patterns=list(WANTED),
                                 ignore_patterns=list(UNWANTED))
    except errors.GatedRepoError as error:
        raise UserError(f"{name}: the Hub gives this repository to those only who have accepted its terms; accept them on its "
                        "page, then hf auth login") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name}: the repository has no such revision; leave @{match['revision']} out for the newest") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{name}: neither a folder nor a repository of the Hub that you may see; check the name, or hf auth "
                        "login") from error
    except (OSError, errors.HTTPError, errors.LocalEntryNotFoundError) as error:
        raise UserError(f"{name}: no such folder, and the Hub cannot be reached ({type(error).__name__}); download it where "
                        "there is a network and give its folder") from error
