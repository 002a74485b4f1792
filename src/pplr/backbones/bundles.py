"""A model in parts on disk: what a client holds, what the server holds, each with a manifest of hashes.

A bundle is a folder with the model's ``config.json``, one safetensors file for each block it holds
(``block-00007.safetensors``, tensors named as in the whole model), ``ends.safetensors`` (embeddings, final norm, head)
and the tokenizer where text is handled, and ``bundle.json``, which says what is in it. Two bundles of one cut name the
same ``base_sha256``, so the two sides can tell that they belong together.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from pplr.errors import BackboneError
from pplr.storage import sha256_bytes, sha256_file, storage_errors, write_atomic, write_json

__all__ = [
    "ENCODERS",
    "FORMAT",
    "Bundle",
    "CheckpointReader",
    "base_fingerprint",
    "block_number",
    "in_plain_layout",
    "is_bundle",
    "read_bundle",
    "total_layers",
    "write_bundles",
]

FORMAT = 1
"""Version of the layout; a newer one is refused."""

ENCODERS = ("bert", "roberta", "longformer")
"""Families of the BERT layout: blocks are ``encoder.layer.N``, maybe below the family's name."""

_MANIFEST = "bundle.json"
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "added_tokens.json", "chat_template*")


class CheckpointReader:
    """The tensors of an HF checkpoint folder, one at a time: whole or in shards, never all in memory.

    Args:
        folder: With ``model.safetensors``, or ``model.safetensors.index.json`` and its shards.

    Raises:
        BackboneError: There is no such file, or one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        try:
            if index.exists():
                self._file_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            else:
                with safe_open(folder / "model.safetensors", framework="pt") as file:
                    self._file_of = dict.fromkeys(file.keys(), "model.safetensors")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise BackboneError(
                f"cannot read the tensors of {folder}: {' '.join(str(error).split())[:200]}",
                cure="Give a folder with model.safetensors, or its index and shards.",
            ) from error

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._file_of)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Read the shape of every tensor, from the files' headers alone."""
        found: dict[str, tuple[int, ...]] = {}
        for file in dict.fromkeys(self._file_of.values()):
            try:
                with safe_open(self.folder / file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  (not a dictionary)
                        found[name] = tuple(opened.get_slice(name).get_shape())
            except (OSError, SafetensorError) as error:
                raise BackboneError(
                    f"cannot read {self.folder / file}: {error}", cure="Fetch the model again."
                ) from error
        return found

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Read some tensors, one after the other."""
        with ExitStack() as stack:
            opened: dict[str, Any] = {}
            for name in names:
                file = self._file_of[name]
                try:
                    if file not in opened:
                        opened[file] = stack.enter_context(safe_open(self.folder / file, framework="pt"))
                    yield name, opened[file].get_tensor(name)
                except (OSError, SafetensorError) as error:
                    raise BackboneError(
                        f"cannot read {name} from {self.folder / file}: {error}", cure="Fetch the model again."
                    ) from error


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files match their hashes.

    Args:
        folder: Where it lies.
        role: ``client`` or ``server``.
        blocks: Absolute numbers of the blocks it holds.
        has_ends: Whether it holds embeddings, norm, head and tokenizer.
        plan: ``input_layers``, ``output_layers`` and ``total_layers`` of the cut.
        base_sha256: Hash of the whole base it was cut from.
        stored_bytes: Bytes of its tensor files.
    """

    folder: Path
    role: str
    blocks: tuple[int, ...]
    has_ends: bool
    plan: Mapping[str, int]
    base_sha256: str
    stored_bytes: int

    def tensors(self) -> dict[str, Tensor]:
        """Load every tensor it holds, by its name in the whole model."""
        files = [*(["ends.safetensors"] if self.has_ends else []), *(_block_file(b) for b in self.blocks)]
        return {name: tensor for file in files for name, tensor in load_file(self.folder / file).items()}


def _plain_name(name: str) -> str | None:
    """Name an encoder's tensor as the encoder alone does; heads and poolers are ``None``."""
    first, _, rest = name.partition(".")
    plain = rest if first in ENCODERS else name
    if plain.startswith(("encoder.", "embeddings.")) and not plain.endswith("position_ids"):
        return plain
    return None


def block_number(name: str, family: str) -> int | None:
    """Say which block of a checkpoint a tensor belongs to.

    Returns:
        Its number, ``None`` for a tensor of the ends, and -1 for one that the backbone does not use.

    Example:
        >>> block_number("model.layers.7.mlp.up_proj.weight", "llama"), block_number("lm_head.weight", "llama")
        (7, None)
        >>> block_number("bert.encoder.layer.3.output.dense.bias", "bert"), block_number("cls.bias", "bert")
        (3, -1)
    """
    plain = _plain_name(name) if family in ENCODERS else name
    if plain is None:
        return -1
    prefix = "encoder.layer." if family in ENCODERS else "model.layers."
    number = plain.removeprefix(prefix).partition(".")[0]
    return int(number) if plain.startswith(prefix) and number.isdigit() else None


def in_plain_layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out an encoder's heads and pooler, and the family's name before what is left."""
    return {plain: tensor for name, tensor in tensors.items() if (plain := _plain_name(name)) is not None}


def base_fingerprint(model: Any, folder: str, blocks: int, dtype: torch.dtype) -> str:
    """Hash every frozen tensor of a model with its name and dtype; for a bundle, name the base it was cut from.

    Args:
        model: The frozen model.
        folder: Where it was loaded from, if it was.
        blocks: How many of its blocks are used.
        dtype: Number format in which it is held.
    """
    if folder and is_bundle(Path(folder)):
        base = read_bundle(Path(folder))
        kept = "" if blocks == base.plan["total_layers"] else f" {blocks} blocks"
        return sha256_bytes(f"bundle {base.base_sha256} {dtype}{kept}".encode())
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().reshape(-1)))
    return digest.hexdigest()


def _block_file(block: int) -> str:
    return f"block-{block:05d}.safetensors"


def is_bundle(folder: Path) -> bool:
    """Tell whether a folder is a bundle."""
    return (folder / _MANIFEST).is_file()


def read_bundle(folder: Path) -> Bundle:
    """Open a bundle and check every file against the manifest.

    Raises:
        BackboneError: It is damaged, or of a newer format.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] > FORMAT:
            raise BackboneError(
                f"the bundle {folder} has format {manifest['format']}, newer than {FORMAT}", cure="Update pplr."
            )
        hashes: dict[str, str] = dict(manifest["sha256"])
        damaged = [n for n, d in hashes.items() if not (folder / n).is_file() or sha256_file(folder / n) != d]
        if damaged:
            raise BackboneError(
                f"the bundle {folder} is damaged: {damaged[0]} does not match its SHA-256", cure="Cut the model again."
            )
        return Bundle(
            folder=folder,
            role=str(manifest["role"]),
            blocks=tuple(int(block) for block in manifest["blocks"]),
            has_ends=bool(manifest["has_ends"]),
            plan={key: int(value) for key, value in manifest["plan"].items()},
            base_sha256=str(manifest["base_sha256"]),
            stored_bytes=sum((folder / n).stat().st_size for n in hashes if n.endswith(".safetensors")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackboneError(
            f"{folder} is no readable bundle ({type(error).__name__})", cure="Cut the model again with `pplr cut`."
        ) from error


def total_layers(folder: Path) -> int:
    """Read a checkpoint's number of blocks.

    Raises:
        BackboneError: It has no readable ``config.json``.
    """
    try:
        return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackboneError(
            f"{folder} has no config.json that gives num_hidden_layers",
            cure="Give a folder of an HF model.",
        ) from error


def write_bundles(
    source: Path,
    out: Path,
    *,
    input_layers: int,
    output_layers: int,
    dtype: str | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[Bundle, Bundle]:
    """Cut a checkpoint into ``out/client`` and ``out/server``, a block at a time.

    Args:
        source: An HF folder of a decoder of the Llama-like layout, or of an encoder of the BERT layout.
        out: A folder that does not exist yet or is empty.
        input_layers: Blocks after the embeddings that stay on the client.
        output_layers: Blocks before the norm that stay on the client.
        dtype: Number format to write; the checkpoint's own when absent.
        advance: Told the number of blocks done.

    Returns:
        The client's and the server's bundle.

    Raises:
        BackboneError: The checkpoint cannot be read, or ``out`` holds something.
    """
    if out.exists() and any(out.iterdir()):
        raise BackboneError(f"{out} is not empty", cure="Choose another --out.")
    total = total_layers(source)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    reader = CheckpointReader(source)
    family = str(config.get("model_type"))
    by_block: dict[int, list[str]] = {block: [] for block in range(total)}
    ends: list[str] = []
    for name in sorted(reader.names):
        number = block_number(name, family)
        if number is None:
            ends.append(name)
        elif number in by_block:
            by_block[number].append(name)
    if missing := [block for block, names in by_block.items() if not names]:
        raise BackboneError(f"{source} has no tensors of block {missing[0]}", cure="Fetch the model again.")
    own = {*range(input_layers), *range(total - output_layers, total)}
    folders = {"client": out / "client", "server": out / "server"}
    hashes: dict[str, dict[str, str]] = {"client": {}, "server": {}}
    base: list[str] = []

    def write(role: str, file: str, names: Iterable[str]) -> None:
        held = {name: t if dtype is None else t.to(getattr(torch, dtype)) for name, t in reader.tensors(names)}
        if family in ENCODERS:
            held = in_plain_layout(held)
        content = save(held, metadata={"format": "pt"})
        write_atomic(folders[role] / file, content)
        hashes[role][file] = sha256_bytes(content)
        base.append(f"{file} {hashes[role][file]}")

    write("client", "ends.safetensors", ends)
    for block, names in by_block.items():
        write("client" if block in own else "server", _block_file(block), names)
        advance(1)
    with storage_errors(out):
        for pattern in _TOKENIZER:
            for path in sorted(source.glob(pattern)):
                shutil.copyfile(path, folders["client"] / path.name)
                hashes["client"][path.name] = sha256_file(path)
    if dtype is not None:
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
    for role, folder in folders.items():
        write_json(folder / "config.json", config)
        hashes[role]["config.json"] = sha256_file(folder / "config.json")
        plan = {"input_layers": input_layers, "output_layers": output_layers, "total_layers": total}
        manifest = {
            "format": FORMAT,
            "role": role,
            "plan": plan,
            "blocks": [block for block in range(total) if (block in own) == (role == "client")],
            "has_ends": role == "client",
            "base_sha256": sha256_bytes("\n".join(sorted(base)).encode()),
            "sha256": hashes[role],
        }
        write_json(folder / _MANIFEST, manifest)
    return read_bundle(folders["client"]), read_bundle(folders["server"])
