"""Where the files of a data set are: found in the user's folders, or downloaded and verified.

Files are looked for under the data folder (an argument or ``REDAN_DATA``), then under the user's cache. What is in
neither is downloaded from its original host into the cache.
"""

import os
import tarfile
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import pooch
from rich.progress import Progress

from redan.data.progress import progress_bar
from redan.errors import DataError


@dataclass(frozen=True)
class Layout:
    """One way in which a data set lies on disk: ``files`` (or folders), all in ``folder`` under the data folder."""

    folder: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Download:
    """One file of a host.

    Attributes:
        url: where it is.
        md5: its published MD5 sum, in hexadecimal.
        path: where it goes under the data folder; ``None`` for a tar archive, whose folders go there as they are.
    """

    url: str
    md5: str
    path: str | None = None


@dataclass(frozen=True)
class Origin:
    """What a data set consists of.

    Attributes:
        name: the data set's name.
        layouts: how it may lie on disk, most usual first; the downloads give the first.
        downloads: what makes the first layout, all below one folder.
    """

    name: str
    layouts: tuple[Layout, ...]
    downloads: tuple[Download, ...]


def user_cache() -> Path:
    """The folder in which redan keeps what it downloaded and decoded."""
    return Path(pooch.os_cache("redan"))


def find(origin: Origin, data_dir: Path | None = None) -> Path | None:
    """The folder that holds all files of a data set, or ``None``.

    Args:
        data_dir: the data folder; by default ``REDAN_DATA``. The user's cache is looked through after it.

    Raises:
        DataError: where the data folder does not exist.
    """
    for root in _roots(data_dir):
        for layout in origin.layouts:
            if not _absent(root, layout):
                return root / layout.folder
    return None


def obtain(origin: Origin, data_dir: Path | None = None, *, download: bool = True) -> Path:
    """The folder that holds all files of a data set, downloaded into the user's cache where it is missing.

    Args:
        data_dir: as ``find`` has it.
        download: whether to download; without it a missing data set is an error.

    Raises:
        DataError: where files are missing and cannot be had, or a download has not the published MD5 sum.
    """
    folder = find(origin, data_dir)
    if folder is not None:
        return folder
    _refuse_partial(origin, data_dir)
    reason = ""
    if download:
        try:
            return _download(origin)
        except OSError as error:  # the errors of requests are OSErrors too
            reason = f", and it could not be downloaded ({error.strerror or type(error).__name__})"
        except (ValueError, tarfile.TarError) as error:
            raise DataError(
                f"the download of {origin.name} is refused: what came is not the published file; "
                "name a folder that holds it with --data-dir or REDAN_DATA"
            ) from error
    layout = origin.layouts[0]
    looked = " and ".join(str(root) for root in _roots(data_dir))
    raise DataError(
        f"no {origin.name}: looked for {Path(layout.folder, layout.files[0])} in {looked}{reason}; "
        "name the folder that holds it with --data-dir or REDAN_DATA"
    )


def check_published(folder: Path, differing: list[str]) -> None:
    """Warn of a user's files that differ from the published ones; refuse those that redan downloaded.

    Args:
        folder: the data set's folder.
        differing: the names of its files whose sums are not the published ones.

    Raises:
        DataError: where ``folder`` is in the user's cache and files differ.
    """
    if not differing:
        return
    files = ", ".join(differing)
    if folder.is_relative_to(user_cache()):
        raise DataError(f"{folder} has changed since it was downloaded ({files}); remove it to download it again")
    warnings.warn(f"{folder} differs from the published files ({files}); its images are used as they are", stacklevel=2)


def _roots(data_dir: Path | None) -> list[Path]:
    given = data_dir or os.environ.get("REDAN_DATA")
    if not given:
        return [user_cache()]
    if not Path(given).is_dir():
        raise DataError(f"no data folder {given}; --data-dir or REDAN_DATA must name one that exists")
    return [Path(given), user_cache()]


def _absent(root: Path, layout: Layout) -> list[str]:
    return [file for file in layout.files if not (root / layout.folder / file).exists()]


def _refuse_partial(origin: Origin, data_dir: Path | None) -> None:
    """A folder with some of the files is a mistake to tell the user, not one to hide behind a long download."""
    for root in _roots(data_dir):
        for layout in origin.layouts:
            absent = _absent(root, layout)
            if len(absent) < len(layout.files):
                raise DataError(f"{root / layout.folder} is not complete: no {', '.join(absent)}")


def _download(origin: Origin) -> Path:
    """Download into a temporary folder of the cache and rename that: the cache holds a whole data set or none."""
    cache = user_cache()
    cache.mkdir(parents=True, exist_ok=True)
    top = Path(origin.layouts[0].folder).parts[0]
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{top}.") as staging, progress_bar() as progress:
        for download in origin.downloads:
            _fetch(download, Path(staging), progress)
        try:
            os.rename(Path(staging, top), cache / top)
        except OSError:
            if _absent(cache, origin.layouts[0]):  # otherwise another process was quicker
                raise
    return cache / origin.layouts[0].folder


def _fetch(download: Download, folder: Path, progress: Progress) -> None:
    name = download.url.rpartition("/")[2]
    target = folder / (download.path or name)
    pooch.retrieve(
        download.url,
        known_hash=f"md5:{download.md5}",
        fname=target.name,
        path=target.parent,
        downloader=pooch.HTTPDownloader(progressbar=_DownloadBar(progress, name), chunk_size=2**20),
    )
    if download.path is None:
        with tarfile.open(target) as archive:
            archive.extractall(folder, filter="data")
        target.unlink()


class _DownloadBar:
    """What pooch expects of a progress bar, drawn by rich."""

    def __init__(self, progress: Progress, description: str) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=None)
        self.total = 0  # bytes; pooch sets it when the host has told

    def update(self, count: int) -> None:
        self._progress.update(self._task, advance=count, total=self.total)

    def reset(self) -> None:
        self._progress.reset(self._task)

    def close(self) -> None:
        self._progress.stop_task(self._task)
