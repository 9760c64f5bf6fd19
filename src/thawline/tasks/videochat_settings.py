"""What the recipes of all video-chat stages say in the same words: the files of weights, and how clips are read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field

from thawline.core import hub
from thawline.core.config import Strict
from thawline.data.video import How
from thawline.errors import CheckpointError, DataError, RecipeError
from thawline.freeze.plan import FreezePlan
from thawline.train.recipe import Recipe

PRESET = "switches"
"""`plan: {preset: switches}`: the plan that the `freeze_*` switches in `options` mean."""


class PartsOptions(Strict):
    """Of `options`: the files of weights."""

    parts: tuple[str, ...] = ()
    """The files of the stages in the order of loading."""

    def part_paths(self) -> tuple[Path, ...]:
        """Where they lie. Raises CheckpointError for one that is not there."""
        made = tuple((self.folder("parts", i) / Path(p).expanduser()).absolute() for i, p in enumerate(self.parts))
        for number, path in enumerate(made):
            if not path.exists():
                raise CheckpointError(
                    f"no such file: {path}", where=self.where("parts", number), fix="check the path of this part"
                )
        return made


class ClipConf(Strict):
    """Of `data.conf`: where clips lie and how they are looked at."""

    media_root: str = ""
    """What relative paths in the instruction or caption file are relative to; empty: the file's own folder."""
    size: int | None = Field(default=None, ge=1)
    """Pixels of a frame's (or a tile's) side; empty: as the model's configuration says."""
    sampling: How = "random"
    """Frames in training; evaluation takes the middle of equal stretches."""
    augment: bool = True
    """Random crop and mirror image in training."""

    def media_folder(self) -> Path | None:
        """The folder that `media_root` names; None for the file's own. Raises DataError where it is not there."""
        if not self.media_root:
            return None
        folder = path_of(self, "media_root")
        if not folder.is_dir():
            raise DataError(
                f"the folder of the clips is not there: {folder}",
                where=self.where("media_root"),
                fix="check media_root; paths in the file are relative to it",
            )
        return folder


@contextmanager
def upstream_values(where: str) -> Iterator[None]:
    """Goes around reading upstream's sections: a value of a kind that upstream never writes is a RecipeError."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, ArithmeticError) as exc:
        raise RecipeError(
            f"a value of the model's configuration is of another kind than upstream's: {exc}",
            where=where,
            fix="compare with upstream's config_*.py of this stage",
        ) from exc


def path_of(settings: Strict, name: str) -> Path:
    """The file or folder that the field `name` holds; a name on the hub leads into the local cache."""
    return hub.local((settings.folder(name) / Path(str(getattr(settings, name))).expanduser()).absolute())


def settled(
    recipe: Recipe,
    options: PartsOptions,
    conf: ClipConf,
    *,
    plan: FreezePlan,
    switches: Collection[str],
    paths: Sequence[str],
) -> Recipe:
    """The recipe with every path absolute, and with `plan` in place of the switches that mean it.

    paths: the options that name one file or folder, where they are text
    """
    kept = {name: value for name, value in recipe.options.items() if name not in switches}
    for name in paths:
        if isinstance(kept.get(name), str) and kept[name]:
            kept[name] = str(path_of(options, name))
    if "parts" in kept:
        kept["parts"] = [str(part) for part in options.part_paths()]
    told = dict(recipe.data.conf)
    if conf.media_root:
        told["media_root"] = str(path_of(conf, "media_root"))
    data = recipe.data.model_copy(update={"conf": told})
    return recipe.model_copy(update={"options": kept, "plan": plan, "data": data})


def refuse_parts_of_random_start(recipe: Recipe, parts: Sequence[object]) -> None:
    """Raises RecipeError where weights are both to be drawn and to be read."""
    if recipe.init == "random" and parts:
        raise RecipeError(
            f"init: random draws every weight, and {len(parts)} files of weights are named",
            where=recipe.where("init"),
            fix="leave out the parts, or init",
        )
