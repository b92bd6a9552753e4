"""Names to paths, through ComfyUI's `folder_paths`: nothing outside its folders can be reached."""

from __future__ import annotations

from pathlib import Path

import folder_paths

SAFETENSORS = (".safetensors", ".sft")
MODEL_FOLDERS = ("diffusion_models", "checkpoints", "text_encoders")


def model_path(folder: str, name: str) -> Path:
    """The path of a model that a loader's list offers.

    Raises:
        FileNotFoundError: there is no such file in that folder.
    """
    return Path(folder_paths.get_full_path_or_raise(folder, name))


def is_safetensors(path: Path) -> bool:
    return path.suffix.lower() in SAFETENSORS


def list_sources() -> list[str]:
    """Safetensors files of all model folders as "folder/name"."""
    return [
        f"{folder}/{name}"
        for folder in MODEL_FOLDERS
        for name in folder_paths.get_filename_list(folder)
        if name.lower().endswith(SAFETENSORS)
    ]


def source_path(choice: str) -> Path:
    """The path behind a choice of `list_sources`."""
    folder, _, name = choice.partition("/")
    if folder not in MODEL_FOLDERS:
        raise ValueError(f"{choice!r} must begin with one of {', '.join(MODEL_FOLDERS)}")
    return model_path(folder, name)


def target_beside(source: Path, choice: str, name: str) -> Path:
    """Where a converted file goes: into the model folder its source is in.

    Args:
        source: the resolved source; choice: as it was picked, "folder/name".
        name: file name, with subfolders if wanted; empty for "<source>-mxfp8.safetensors".

    Raises:
        ValueError: the name leaves the model folder.
    """
    if not name.strip():
        return source.with_name(f"{source.stem}-mxfp8.safetensors")
    folder = choice.partition("/")[0]
    # By name, not by what links lead to: a linked model belongs to the folder that lists it.
    roots = [Path(root) for root in folder_paths.get_folder_paths(folder)]
    root = next(root for root in roots if source.is_relative_to(root))
    if not name.lower().endswith(SAFETENSORS):
        name += ".safetensors"
    target = root / name
    if "\0" in name or not folder_paths.is_within_directory(str(root), str(target)):
        raise ValueError(f"the name {name!r} leaves the folder {folder!r}; give a name inside it")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def save_path(prefix: str) -> Path:
    """output/<prefix>_00001_.safetensors, counting up as ComfyUI's own save nodes do."""
    folder, name, counter, _, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory()
    )
    return Path(folder) / f"{name}_{counter:05}_.safetensors"


def temporary_path(name: str) -> Path:
    """A path in ComfyUI's temp folder, which ComfyUI empties when it starts and stops."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name
