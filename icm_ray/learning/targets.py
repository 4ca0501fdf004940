"""Which modules' inputs an objective looks at; blocks are found by parsing paths."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from icm_ray.adapters.blocks import block_index, block_path, ends_in
from icm_ray.errors import InputError, RecipeError

OUTPUTS = ("o_proj", "out_proj", "attention.output.dense", "attn.c_proj", "self_attn.dense", "wo")
VALUES = ("v_proj", "value", "query_key_value", "qkv_proj", "qkv", "c_attn", "wv")
"""Usual names of attention's output and value projections, as a path ends."""
INPUTS = (*VALUES, "q_proj", "k_proj", "query", "key", "wq", "wk")
"""Those that read their block's input as it is: none of them lies behind another one."""
UNREACHED = (
    "targets: no adapted module changes what they read, so the loss depends on no coefficient. "
    "Merge adapters of more layers, name targets behind adapted modules (learn.objective.names, "
    "blocks), or learn by outputs: distillation, task_vector_match."
)
"""How it is said that nothing can be learned."""


@dataclass(frozen=True)
class Targets:
    """Which adapted modules are looked at.

    Attributes:
        names: Ends of module paths; "output" takes the attention's output projection where it is
            adapted, else its value projection, else the block's last adapted module; "all" takes
            every adapted module.
        blocks: Block indices; None takes the last `share` of the adapted blocks, rounded up.
        share: In (0, 1].
    """

    names: Literal["output", "all"] | tuple[str, ...] = "output"
    blocks: tuple[int, ...] | None = None
    share: float = 0.25

    def choose(self, modules: Iterable[str]) -> tuple[str, ...]:
        """Return the targets among `modules`, sorted.

        Raises:
            RecipeError: no module matches.
        """
        by_block: dict[int, list[str]] = {}
        for path in sorted(modules):
            index = block_index(path)
            if index is not None:
                by_block.setdefault(index, []).append(path)
        chosen = [
            path
            for index in self._wanted(sorted(by_block))
            for path in self._of_block(by_block.get(index, []))
        ]
        if not chosen:
            raise RecipeError(
                f"targets: no adapted module matches names {self.names!r} in blocks "
                f"{self.blocks or f'of the last {self.share:g}'}. The adapted blocks are "
                f"{', '.join(map(str, sorted(by_block))) or 'none'}."
            )
        return tuple(sorted(chosen))

    def refuse_unreached(self, modules: Iterable[str]) -> None:
        """Raise InputError if no target among `modules` of a merge lies behind another of them.

        Names tell that of attention's inputs in the first adapted block; of other modules a pass
        does, and `Descent` refuses.
        """
        blocks = {path: block_index(path) for path in modules}
        known = [index for index in blocks.values() if index is not None]
        stacks = {str(block_path(path)).rpartition(".")[0] for path in blocks}
        if len(known) < len(blocks) or len(stacks) > 1:  # one may feed the other
            return
        targets = self.choose(blocks)
        is_one = len({path.rpartition(".")[0] for path in targets}) == 1
        if is_one and all(blocks[path] == min(known) and ends_in(path, INPUTS) for path in targets):
            raise InputError(UNREACHED)

    def _wanted(self, adapted: Sequence[int]) -> Sequence[int]:
        if self.blocks is not None:
            return self.blocks
        return adapted[len(adapted) - math.ceil(len(adapted) * self.share) :]

    def _of_block(self, paths: Sequence[str]) -> list[str]:
        if self.names == "all":
            return list(paths)
        if self.names == "output":
            for ends in (OUTPUTS, VALUES):
                if found := [path for path in paths if ends_in(path, ends)]:
                    return found
            return list(paths[-1:])
        return [path for path in paths if ends_in(path, self.names)]
