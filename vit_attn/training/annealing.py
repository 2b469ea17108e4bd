"""α on its way from softmax's end of entmax to where it is wanted, and the best checkpoint of those that are there."""

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from vit_attn.attention import attention_layers
from vit_attn.attention.normalizers.entmax import AlphaCore, annealing_cores
from vit_attn.errors import UserError
from vit_attn.training.described import is_score

log = logging.getLogger("vit_attn")


def annealing_progress(step: int, *, steps: int) -> float:
    """Share of the way that α has gone in optimizer step ``step``, from 0: 1 from the last of ``steps`` steps on."""
    return 1.0 if step >= steps - 1 else step / (steps - 1)


class AlphaAnnealing(Callback):
    """Move α in a line from ``anneal_alpha_from`` to ``alpha``, by the optimizer step, in the layers that anneal it.

    α is a function of the step alone, so a run that goes on has the α that it would have had.

    Args:
        share: of all optimizer steps, those that α takes to its end, where it then stays; 0 begins there.

    Raises:
        UserError: no share.
    """

    def __init__(self, *, share: float = 0.5) -> None:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise UserError(f"callbacks.alpha_annealing.share is a share, from 0 to 1, not {share!r}")
        self.share = share
        self.cores: list[AlphaCore] = []
        self.steps = 0
        self.progress: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.cores = annealing_cores(pl_module)
        self.progress = None
        if self.cores:
            total = int(trainer.estimated_stepping_batches)
            self.steps = round(self.share * total)
            entmax = self.cores[0].normalizer
            ends = entmax.anneal_alpha_from, entmax.alpha
            log.info("alpha      %g to %g in the first %d of %d steps", *ends, self.steps, total)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.cores:
            return
        progress = annealing_progress(trainer.global_step, steps=self.steps)
        if progress != self.progress:
            for core in self.cores:
                core.anneal(progress)
            self.progress = progress


class BestCheckpoint(ModelCheckpoint):
    """A ``ModelCheckpoint`` that takes no model whose α is still on its way: what is scored is what was asked for.

    The accuracy of an early epoch, at an α near softmax, would otherwise stand for that of ``alpha``.
    """

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether the model as it is now is to be saved."""
        layers = attention_layers(trainer.lightning_module)
        return all(layer.core.settled() for layer in layers) and super().check_monitor_top_k(trainer, current)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the score of the best one too, which Lightning writes but does not read.

        And wherever the run's folder is by now: in one that was moved, Lightning forgets what was best.

        Raises:
            TypeError: what should be scores are none.
            KeyError: something is missing.
        """

        def here(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        paths = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        models = {here(path): score for path, score in state_dict["best_k_models"].items()}
        known = [state_dict["kth_value"], *models.values()]
        known += [state_dict[key] for key in ("best_model_score", "current_score") if state_dict[key] is not None]
        if not all(map(is_score, known)) or (models and paths["kth_best_model_path"] not in models):
            raise TypeError("what it says of the best checkpoint is no score")
        super().load_state_dict({**state_dict, **paths, "best_k_models": models, "dirpath": self.dirpath})
        self.current_score = state_dict["current_score"]
