"""Access to the Hugging Face hub that fails fast, and says in one line what was tried and what to do instead.

One quick request tells whether the hub answers; where it does not (or HF_HUB_OFFLINE is set), only what is already
on this machine is used. Without it, a machine without network waits through many retries.
"""

from dataclasses import dataclass

from experiments.config import SetupError

_TIMEOUT_SEC = 10


@dataclass(frozen=True)
class HubAnswer:
    """Whether the hub knows a repository: its commit, or None with the reason why the hub gave no answer."""

    commit: str | None
    reason: str = ""


def ask_hub(repo: str, kind: str) -> HubAnswer:
    """Ask for the commit of a "model" or "dataset" repository; raises SetupError if the hub says there is none."""
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    api = huggingface_hub.HfApi()
    ask = {"model": api.model_info, "dataset": api.dataset_info}[kind]
    try:
        return HubAnswer(ask(repo, timeout=_TIMEOUT_SEC).sha)
    except OfflineModeIsEnabled:
        return HubAnswer(None, "HF_HUB_OFFLINE is set")
    except GatedRepoError:
        raise SetupError(f"{kind} {repo!r}: the hub asks you to log in and accept its terms first") from None
    except RepositoryNotFoundError:
        raise SetupError(f"{kind} {repo!r}: the hub knows no such {kind}") from None
    except HFValidationError as error:
        raise SetupError(f"{kind} {repo!r} is no valid hub name: {error}") from None
    except Exception as error:  # each version of the hub's client has network errors of its own
        return HubAnswer(None, f"{type(error).__name__}: {error}")


def hub_dataset_column(repo: str, config: str | None, split: str, column: str) -> list[str]:
    """One column of a data set's split, from the hub or from this machine's copy of it."""
    try:
        import datasets
    except ImportError as error:
        raise SetupError(f"data set {repo}: needs the package `datasets`, which cannot be imported: {error}") from None

    answer = ask_hub(repo, "dataset")
    download = datasets.DownloadConfig(local_files_only=answer.commit is None, max_retries=1)
    try:
        with _offline(datasets, answer.commit is None):
            rows = datasets.load_dataset(repo, config, split=split, download_config=download)
    except Exception as error:  # a missing copy, a broken download: the kinds differ between versions
        reason = answer.reason or f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise SetupError(
            f"data set {repo} ({split}) could not be loaded: the hub was asked and this machine's cache was looked "
            f"at ({reason}); pass a local file instead: --datasets path/to/text.txt"
        ) from None
    return list(rows[column])


class _offline:  # noqa: N801 - reads as a statement
    """Tell the `datasets` library, for the time of one call, that there is no hub (it retries for long otherwise)."""

    def __init__(self, datasets, active: bool):
        self.config, self.active = datasets.config, active

    def __enter__(self):
        self.before = self.config.HF_HUB_OFFLINE
        self.config.HF_HUB_OFFLINE = self.active or self.before

    def __exit__(self, *_):
        self.config.HF_HUB_OFFLINE = self.before
