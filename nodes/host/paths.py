"""Names to paths, through ComfyUI's `folder_paths`: nothing outside its folders can be reached."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from io import FileIO
from pathlib import Path

import folder_paths

from ...quant.container.header import SUFFIXES
from ...quant.container.writer import new_folders
from ...quant.conversion.batch import Job
from ...quant.sources import shards
from .filenames import check_name, check_target, is_inside

MODEL_FOLDERS = ("diffusion_models", "checkpoints", "text_encoders")


def model_path(folder: str, name: str) -> Path:
    """The path of a model that a loader's list offers.

    Raises:
        FileNotFoundError: there is no such file in that folder.
    """
    return Path(folder_paths.get_full_path_or_raise(folder, name))


def is_safetensors(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def list_sources() -> list[str]:
    """Models of all model folders as "folder/name".

    A model in several files is one entry: its folder, or its index where the folder holds more.
    """
    return [
        f"{folder}/{name}"
        for folder in MODEL_FOLDERS
        for name in sorted({*_single_files(folder), *_sharded(folder)})
    ]


def list_files() -> list[str]:
    """Single safetensors files of all model folders as "folder/name"."""
    return [f"{folder}/{name}" for folder in MODEL_FOLDERS for name in _single_files(folder)]


def list_any() -> list[str]:
    """What `list_sources` has, and files of any other kind that may hold a model."""
    return sorted({
        *list_sources(),
        *(f"{folder}/{name}" for folder in MODEL_FOLDERS for name in _others(folder)),
    })  # fmt: skip


def source_path(choice: str) -> Path:
    """The file, or the index of several, behind a choice of these lists."""
    folder, _, name = choice.partition("/")
    if folder not in MODEL_FOLDERS:
        raise ValueError(f"{choice!r} must begin with one of {', '.join(MODEL_FOLDERS)}")
    return model_path(folder, _sharded(folder).get(name, name))


def _others(folder: str) -> list[str]:
    """Files of other kinds than safetensors; ComfyUI itself does not list GGUF files."""
    names = [*folder_paths.get_filename_list(folder)]
    for root in folder_paths.get_folder_paths(folder):
        names += _gguf_files(root)
    return [name for name in names if not name.lower().endswith(SUFFIXES)]


# Folder -> its GGUF files, and when it and its subfolders last changed.
_searched: dict[str, tuple[list[str], dict[str, float]]] = {}


def _gguf_files(root: str) -> list[str]:
    """The GGUF files in a folder, searched again when one of its folders changed, as ComfyUI does:
    it asks for the lists on every load of the page and before every run."""
    found, changed = _searched.get(root, ([], {}))
    if not changed or any(_changed(place) != when for place, when in changed.items()):
        names, changed = folder_paths.recursive_search(root, excluded_dir_names=[".git"])
        found = [name for name in names if name.lower().endswith(".gguf")]
        _searched[root] = found, changed
    return found


def _changed(folder: str) -> float | None:
    try:
        return os.path.getmtime(folder)
    except OSError:
        return None


def _single_files(folder: str) -> list[str]:
    names = folder_paths.get_filename_list(folder)
    return [n for n in names if n.lower().endswith(SUFFIXES) and not shards.is_shard(n)]


def _sharded(folder: str) -> dict[str, str]:
    """Models in several files: their name in the list -> the name of their index.

    ComfyUI does not list indexes, but it does list shards, and an index lies beside them.
    """
    index_of: dict[str, str] = {}
    parts = filter(shards.is_shard, folder_paths.get_filename_list(folder))
    for place, part in sorted({Path(part).parent: part for part in parts}.items()):
        path = folder_paths.get_full_path(folder, part)
        indexes = [place / i.name for i in shards.indexes(Path(path).parent)] if path else []
        alone = len(indexes) == 1 and place.name
        for index in indexes:
            names = (_model_folder(place), place, index) if alone else (index,)
            name = next(n for n in map(str, names) if n not in index_of)
            index_of[name] = str(index)
    return index_of


def _model_folder(place: Path) -> Path:
    """The folder that a user calls the model: of a pipeline, the one around its transformer."""
    return place.parent if place.name in ("transformer", "unet") and place.parent.name else place


def target_beside(source: Path, choice: str, name: str, suffix: str) -> Path:
    """The path of a file made from another: in the model folder that its source is in.

    Args:
        source: the resolved source.
        choice: as it was chosen, "folder/name".
        name: file name as typed, with subfolders if wanted; empty for the source's name with
            "-suffix", beside it, or beside its folder if the folder holds only that model.

    Raises:
        ValueError: some system cannot store the name, or it is outside the model folder.
    """
    folder, _, chosen = choice.partition("/")
    # Links are not followed: a linked model belongs to the folder that lists it.
    roots = [Path(root) for root in folder_paths.get_folder_paths(folder)]
    root = next(root for root in roots if source.is_relative_to(root))
    if not name.strip():
        target = root / f"{shards.model_name(chosen)}-{suffix}.safetensors"
        check_target(folder, target)
        return target
    name = check_name("target", name)
    if not name.lower().endswith(SUFFIXES):
        name += ".safetensors"
    target = root / name
    if not is_inside(root, target):
        raise ValueError(f"{name!r} is outside the folder {folder!r}; give a name inside it")
    return target


def listed_name(choice: str, target: Path) -> str:
    """The name by which loaders list a file that was made from a choice, in the same folder."""
    roots = folder_paths.get_folder_paths(choice.partition("/")[0])
    return str(target.relative_to(next(root for root in roots if target.is_relative_to(root))))


def find_jobs(lines: str, suffix: str) -> list[Job]:
    """The conversions that lines stand for: of sources in `list_sources`, each to a file beside it.

    Args:
        lines: names as in the list, folders, and patterns, in which "*" stands for subfolders too.
        suffix: as for `target_beside`.

    Raises:
        ValueError: there is no line, or nothing in the list fits one.
    """
    listed = {choice.replace("\\", "/"): choice for choice in list_sources()}
    chosen: dict[str, None] = {}
    wanted = [line.strip() for line in lines.splitlines() if line.strip()]
    if not wanted:
        raise ValueError("no source is given; write a file, a folder or a pattern in each line")
    for line in wanted:
        line = line.replace("\\", "/")
        folder = line.rstrip("/") + "/"
        found = [
            choice
            for name, choice in listed.items()
            if name == line or name.startswith(folder) or fnmatch.fnmatchcase(name, line)
        ]
        if not found:
            raise ValueError(
                f"no model fits {line!r}; sources begin with one of {', '.join(MODEL_FOLDERS)}, "
                "as in the list of Convert File (MXFP8)"
            )
        chosen |= dict.fromkeys(found)
    jobs = [Job(path := source_path(c), target_beside(path, c, "", suffix)) for c in chosen]
    targets = {job.target for job in jobs}
    return [job for job in jobs if job.source not in targets]


def folder_of(target: Path) -> AbstractContextManager[None]:
    """Make the folder of a file that will be written; new ones are removed if that fails."""
    return new_folders(target.parent)


@contextlib.contextmanager
def saving(prefix: str) -> Iterator[Path]:
    """output/<prefix>_00001_.safetensors, counting up as ComfyUI's own save nodes do.

    New folders are removed if writing the file fails.

    Raises:
        ValueError: some system cannot store the name, or it is outside the output folder, links
            followed: before 0.30 ComfyUI does not follow them.
    """
    prefix = check_name("filename_prefix", prefix)
    root = folder_paths.get_output_directory()
    _check_inside_output(root, prefix, Path(root) / prefix)
    with tempfile.TemporaryDirectory() as elsewhere:  # ComfyUI makes the folder that it names
        subfolder = folder_paths.get_save_image_path(prefix, elsewhere)[3]
    with new_folders(Path(root, subfolder)):
        folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, root)
        path = Path(folder) / f"{name}_{counter:05}_.safetensors"
        _check_inside_output(root, prefix, path)  # ComfyUI may have filled in variables
        yield path


def _check_inside_output(root: str, prefix: str, path: Path) -> None:
    if not is_inside(root, path):
        raise ValueError(
            f"filename_prefix {prefix!r} is outside the output folder; give a name inside it"
        )


CALIBRATIONS = "calibrations"  # a folder inside output/


def list_calibrations() -> list[str]:
    """Names of the files in output/calibrations."""
    folder = Path(folder_paths.get_output_directory(), CALIBRATIONS)
    return sorted(p.name for p in folder.glob("*.safetensors")) if folder.is_dir() else []


def calibration_path(name: str) -> Path:
    """The path of a listed calibration.

    Raises:
        FileNotFoundError: it no longer exists.
    """
    if name not in list_calibrations():
        raise FileNotFoundError(
            f"{name!r} is no longer in output/{CALIBRATIONS}; choose another, or save one"
        )
    return Path(folder_paths.get_output_directory(), CALIBRATIONS, name)


def unfinished_folder() -> Path:
    """Where the measurements of interrupted calibrations are kept; ComfyUI never empties it."""
    folder = Path(folder_paths.get_output_directory(), CALIBRATIONS, "unfinished")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def temporary_folder() -> Path:
    """ComfyUI's temp folder, which every ComfyUI that uses it empties on start and exit."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class TemporaryFile:
    """A file in the temp folder, deleted when nothing refers to this object any more.

    A second ComfyUI on the same folders deletes it earlier, when it starts. So it is held open once
    it is written: its data then stay readable. (Windows does not delete an open file.)
    """

    def __init__(self):
        self.path = temporary_folder() / f"mxfp8-{uuid.uuid4().hex}.safetensors"
        self._opened = contextlib.ExitStack()
        weakref.finalize(self, _delete, self.path, self._opened)

    def hold(self) -> None:
        """Hold the file open, which has been written to `path`."""
        self._file = self._opened.enter_context(self.path.open("rb", buffering=0))

    def reopen(self) -> FileIO:
        """The file, opened for reading without its path, for one reader at a time."""
        return open(os.dup(self._file.fileno()), "rb", buffering=0)

    def restored(self) -> Path:
        """The path, at which the file is written again if it was deleted."""
        if not self.path.exists():
            temporary_folder()
            part = self.path.with_suffix(".part")
            try:
                with self.reopen() as file, part.open("wb") as copy:
                    file.seek(0)
                    shutil.copyfileobj(file, copy, 1 << 22)
                part.replace(self.path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        return self.path


def _delete(path: Path, opened: contextlib.ExitStack) -> None:
    opened.close()
    with contextlib.suppress(OSError):  # Windows does not delete a mapped file
        path.unlink()
