"""Publish a checkpoint: the folder as it will be on the Hub, and one commit that holds all of it."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import BaseImageProcessor

from cap_hf.checkpoints.atomic import atomic_directory
from cap_hf.checkpoints.compressing import compress_weights
from cap_hf.checkpoints.files import check_file, copy_weights
from cap_hf.checkpoints.folder import (
    COMPANIONS,
    MODEL_CONFIG_NAME,
    PROCESSOR_NAME,
    REPORT_NAME,
    check_inside,
    copy_file,
    read_json,
)
from cap_hf.checkpoints.loading import check_folder
from cap_hf.checkpoints.location import check_name
from cap_hf.checkpoints.weights import find_weight_files
from cap_hf.compressor import CAPCompressor
from cap_hf.config import CONFIG_NAME
from cap_hf.distributed.temporary import TemporaryFolder
from cap_hf.errors import CAPError, reason
from cap_hf.hub.card import CARD_NAME, PICTURE_NAME, CardFacts
from cap_hf.hub.eval_results import write_eval_results
from cap_hf.hub.names import one_line
from cap_hf.hub.picture import draw_sparsity
from cap_hf.hub.privacy import Private, clean_folder

# What is published beside the weights, their index and the card.
FILES = (MODEL_CONFIG_NAME, PROCESSOR_NAME, *COMPANIONS, CONFIG_NAME, REPORT_NAME)
# What a card says that comes from a report or a config, and may be private.
REPORTED = ("base_model", "run", "license", "dataset", "dataset_config", "dataset_split", "config", "versions")
WEIGHT_ENDINGS = (".safetensors", ".safetensors.index.json")
# Seconds before each further attempt.
WAITS = (1, 4)

T = TypeVar("T")


def push_to_hub(
    checkpoint: str | Path | CAPCompressor,
    repo_id: str,
    image_processor: BaseImageProcessor | None = None,
    compressed: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Publish a checkpoint with its image processor, report, card and picture, in one commit.

    The repository is created if it does not exist; weights that it holds under other names are removed in the same
    commit. Nobody ever sees a part of a push: the files appear with the commit or not at all.

    Args:
        checkpoint: a folder, or a compressor that has pruned its model.
        repo_id: `user/name`.
        image_processor: for a compressor's model; a folder holds its own.
        compressed: publish the weights compressed; a folder that is compressed stays so.
        private: whether a new repository is private; None for the Hub's default.
        revision: the branch to commit to; created if need be.
        create_pr: open a pull request instead of committing.
        commit_message: of the commit.
        token: None for the one that huggingface_hub finds.
        base_model: Hub id of the dense model, for the card; None for the report's.
        license: for the card; None for the base model's.
        trust_remote_code: run the code that the checkpoint brings along, to load it for the card.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        CAPError: the checkpoint is incomplete, or the Hub refuses; nothing was published then.
    """
    check_repo_id(repo_id)
    with TemporaryFolder() as scratch:
        if isinstance(checkpoint, CAPCompressor):
            folder = Path(scratch) / "checkpoint"
            checkpoint.save_pretrained(folder, image_processor)
        else:
            check_name(checkpoint, "a checkpoint's folder")
            folder = Path(checkpoint)
        ready = Path(scratch) / "ready"
        prepare_folder(folder, ready, repo_id, compressed, base_model, license, trust_remote_code, token)
        return upload_folder(ready, repo_id, private, revision, create_pr, commit_message, token)


def prepare_folder(
    checkpoint: str | Path,
    directory: str | Path,
    repo_id: str,
    compressed: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    trust_remote_code: bool = False,
    token: str | None = None,
) -> CardFacts:
    """Write the folder exactly as `push_to_hub` would publish it, atomically; arguments and errors as there.

    Paths of this machine and names of its user and host, which a checkpoint may hold, are not published.

    Returns:
        What its card says.
    """
    check_repo_id(repo_id)
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise CAPError(f"{checkpoint} is no folder: save the checkpoint first")
    files, private = find_weight_files(checkpoint), Private.here()
    if not (checkpoint / PROCESSOR_NAME).is_file():
        raise CAPError(f"{checkpoint} has no {PROCESSOR_NAME}: save the model's image processor there first")
    with atomic_directory(directory, checkpoint) as folder:
        for path in published_files(checkpoint):
            copy_file(path, checkpoint, folder)
        if compressed and not files.compressed:
            compress_weights(checkpoint, folder)
        else:
            for path in files.paths:
                check_inside(path, checkpoint)
                check_file(path)
                copy_weights(path, folder / path.name, private.clean)
            if files.index:
                copy_file(files.index, checkpoint, folder)
        # Errors name the checkpoint's own files; what is published are the same ones, or their weights compressed.
        facts = CardFacts.gather(checkpoint, repo_id, base_model, license, trust_remote_code)
        clean_folder(folder, private)
        try:
            published = check_folder(folder, trust_remote_code)
        except CAPError as error:
            raise CAPError(f"{checkpoint} cannot be loaded without what is private in it: {error}") from error
        facts = replace(facts, compressed=published.compressed, file_bytes=published.num_bytes)
        facts = replace(facts, **private.clean({name: getattr(facts, name) for name in REPORTED}))
        facts.render().save(folder / CARD_NAME)
        write_eval_results(folder, facts, token)
        draw_sparsity(
            [layer["name"] for layer in facts.layers],
            [layer["num_zeros"] / layer["num_weights"] for layer in facts.layers],
            facts.sparsity,
            folder / PICTURE_NAME,
        )
    return facts


def published_files(checkpoint: Path) -> list[Path]:
    """Return what is published beside the weights and the card: JSON, a tokenizer, and code if config.json names some.

    Raises:
        CAPError: config.json cannot be read, or something that is published has the name of a file and is none.
    """
    paths = [checkpoint / name for name in FILES if os.path.lexists(checkpoint / name)]
    if wrong := [path for path in paths if not path.is_file()]:
        raise CAPError(f"{wrong[0]} is no file")
    if "auto_map" in read_json(checkpoint / MODEL_CONFIG_NAME):
        paths += sorted(path for path in checkpoint.glob("*.py") if path.is_file())
    return paths


def open_repository(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Create a repository unless it exists; return its whole name, with that of the token's owner if it had none.

    Raises:
        CAPError: the Hub refuses, or the repository is public and should be private.
    """
    check_repo_id(repo_id)
    api = HfApi(token=token)
    with hub_errors(repo_id):
        repo_id = attempt(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        if private and not attempt(lambda: api.model_info(repo_id)).private:
            raise CAPError(f"{repo_id} exists and is public: make it private on the Hub or choose another name")
    return repo_id


def upload_folder(
    folder: Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Commit all files of a folder at once; arguments, result and errors as for `push_to_hub`."""
    repo_id, api = open_repository(repo_id, private, token), HfApi(token=token)
    additions = [
        CommitOperationAdd(path_in_repo=path.relative_to(folder).as_posix(), path_or_fileobj=str(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    with hub_errors(repo_id):
        if revision is not None and revision != "main":
            attempt(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        names = {addition.path_in_repo for addition in additions}
        stale = [
            CommitOperationDelete(path_in_repo=name)
            for name in attempt(lambda: api.list_repo_files(repo_id, revision=revision))
            if "/" not in name and name.endswith(WEIGHT_ENDINGS) and name not in names
        ]
        attempt(
            lambda: api.preupload_lfs_files(
                repo_id, additions, revision=revision, create_pr=create_pr, free_memory=False
            )
        )
        commit = attempt(
            lambda: api.create_commit(
                repo_id,
                [*additions, *stale],
                commit_message=commit_message or "Upload a model pruned with cap_hf",
                revision=revision,
                create_pr=create_pr,
            ),
            # Files committed twice are the same files; a pull request opened twice is two.
            waits=() if create_pr else WAITS,
        )
    return commit.pr_url or commit.commit_url


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what the Hub or the way there says into a CAPError."""
    try:
        yield
    except CAPError:
        raise
    except LocalTokenNotFoundError as error:
        raise CAPError("no Hub token was found: log in with `hf auth login`") from error
    except (HTTPError, OSError, ValueError) as error:
        raise CAPError(explain(repo_id, error)) from error


def attempt(action: Callable[[], T], waits: tuple[int, ...] = WAITS) -> T:
    """Do something that may be done twice, and once more after each wait if the server or the connection fails."""
    for wait in (*waits, None):
        try:
            return action()
        except (HTTPError, OSError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            transient = isinstance(error, (HTTPError, ConnectionError)) and (status is None or status >= 500)
            if wait is None or not transient or isinstance(error, LocalTokenNotFoundError):
                raise
            time.sleep(wait)
    raise AssertionError("the last wait is None")


def explain(repo_id: str, error: Exception) -> str:
    """Return one line about a push that failed; never a token, which no error of huggingface_hub quotes."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = getattr(error, "server_message", None)
    said = one_line(said or reason(error))
    known = {
        401: "the token is missing, expired or wrong: log in with `hf auth login`",
        403: "the token may not write there: use one with write rights or choose another --hub_model_id",
        404: "there is no such repository or branch, or the token may not see it",
    }
    advice = "try again later" if status is None or status >= 500 else known.get(status, "")
    return f"{repo_id} was not pushed, nothing was published: {said}{': ' if advice else ''}{advice}"


def check_repo_id(repo_id: str) -> None:
    """Raise a CAPError unless this can be the name of a repository."""
    check_name(repo_id, "a repository, user/name")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise CAPError(f"--hub_model_id {one_line(repo_id)!r} cannot be a repository: user/name is") from error
