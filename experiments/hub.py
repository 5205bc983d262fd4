"""Access to the hub and its package `datasets`: fails fast, saying in one line what was tried and what to do instead.

One quick request tells whether the hub answers; where it does not (or HF_HUB_OFFLINE is set), only what is already
on this machine is used. Without it, a machine without network waits through many retries.
"""

from collections.abc import Sequence
from types import ModuleType

from experiments.config import SetupError, first_line

_TIMEOUT_SEC = 10
_SPLITS = ("test", "validation", "train")  # the first that a data set has is taken


def ask_hub(repo: str, kind: str) -> tuple[str | None, str]:
    """The commit of a "model" or "dataset" repository, or None, with the reason why the hub gave no answer.

    Raises SetupError if the hub says that there is none.
    """
    import huggingface_hub
    from huggingface_hub import errors

    api = huggingface_hub.HfApi()
    ask = {"model": api.model_info, "dataset": api.dataset_info}[kind]
    try:
        return ask(repo, timeout=_TIMEOUT_SEC).sha, ""
    except errors.OfflineModeIsEnabled:
        return None, "HF_HUB_OFFLINE is set"
    except errors.GatedRepoError:
        raise SetupError(f"{kind} {repo!r}: the hub asks you to log in and accept its terms first") from None
    except errors.RepositoryNotFoundError:
        raise SetupError(f"{kind} {repo!r}: the hub knows no such {kind}") from None
    except errors.HFValidationError as error:
        raise SetupError(f"{kind} {repo!r} is no valid hub name: {error}") from None
    except Exception as error:  # each version of the hub's client has network errors of its own
        return None, f"{type(error).__name__}: {error}"


def datasets_library(name: str) -> ModuleType:
    """The package `datasets`, which reads all but plain text; raises SetupError where it is not installed."""
    try:
        import datasets
    except ImportError:
        raise SetupError(
            f"data set {name}: all but plain text is read by the package datasets, which is not installed: "
            "pip install datasets, or pass a .txt file (plain or compressed)"
        ) from None
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # what it logs, it also raises
    return datasets


def hub_rows(name: str, repo: str, config: str | None, split: str | None) -> tuple[Sequence[dict], str]:
    """The records of a data set's split, from the hub or from this machine's copy of it, and the split's name.

    `split` None: the first of test, validation and train that there is. `name`: what the errors call it.
    """
    datasets = datasets_library(name)
    commit, reason = ask_hub(repo, "dataset")
    offline = commit is None
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or before  # else the library retries for long
    try:
        download = datasets.DownloadConfig(local_files_only=offline, max_retries=1)
        found = datasets.load_dataset(repo, config, split=split, download_config=download)
    except Exception as error:  # a missing copy, a broken download: the kinds differ between versions
        reason = reason or f"{type(error).__name__}: {first_line(error)}"
        raise SetupError(
            f"data set {name} could not be loaded: the hub was asked and this machine's cache was looked at "
            f"({reason}); pass a local file instead: --datasets path/to/text.txt"
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    if split is None:
        split = next((part for part in _SPLITS if part in found), next(iter(found)))
        found = found[split]
    return found, split
