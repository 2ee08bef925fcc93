"""`--push-to-hub`: uploads a finished model to the Hugging Face Hub.

`check_target` checks the token before the long work starts, not after hours of training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from koala.checkpoints import card_text, model_card
from koala.checkpoints.resolve import HUB_ID
from koala.errors import Failure, UserError


def check_target(target: str) -> None:
    """Checks the token with the Hub. Creates and uploads nothing.

    target: "ORG/NAME". UserError if it has another form or the token is missing or rejected;
    Failure if the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not HUB_ID.fullmatch(target):
        raise UserError(f"--push-to-hub {target!r}: it must be ORG/NAME, such as my-name/my-model")
    try:
        validate_repo_id(target)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {target!r}: {error}") from None
    if not get_token():
        raise UserError(
            f"--push-to-hub {target}: no token; run `hf auth login` or set HF_TOKEN to "
            "a token with write access"
        )
    with _explained(target):
        HfApi().whoami()


def push(model: str | Path, target: str) -> str:
    """Uploads a model folder or a single file in one commit and returns its URL.

    The repository is created if needed. A model card written by koala is uploaded with snippets
    that load `target`; the local card is unchanged. UserError if the Hub rejects the upload,
    Failure if it cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    model = Path(model)
    contents: dict[str, Path | bytes] = {model.name: model}
    if model.is_dir():
        files = sorted(path for path in model.rglob("*") if path.is_file())
        contents = {path.relative_to(model).as_posix(): path for path in files}
    if model_card.FILE in contents and (written := model_card.read(model)).ours:
        contents[model_card.FILE] = card_text.text(
            written, target, model_card.drawn_with(model)
        ).encode()
    with _explained(target):
        api = HfApi()
        address = api.create_repo(target, exist_ok=True)
        api.create_commit(
            target,
            [CommitOperationAdd(name, content) for name, content in contents.items()],
            commit_message="Upload by koala",
        )
    return str(address)


@contextlib.contextmanager
def _explained(target: str) -> Iterator[None]:
    """Turns errors of the Hub and of the network into one line."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = f"the Hub answers {status}: {error.server_message or error}"
        if 400 <= status < 500 and status != 429:
            raise UserError(
                f"--push-to-hub {target}: {reason}; check the token (`hf auth whoami`) and its "
                "write access"
            ) from error
        raise Failure(f"--push-to-hub {target}: {reason}; try again later") from error
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: from the upload client
        raise Failure(
            f"--push-to-hub {target}: the Hub cannot be reached ({error}); check the network"
        ) from error
