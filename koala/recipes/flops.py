"""FLOPs of a training's sample, from the architectures.

A backward pass costs two forward passes; one, where weights are frozen: through a teacher, or if
only a LoRA is trained. Loads no torch.
"""

from koala.architectures.flops import flops as forward_flops
from koala.architectures.table import UNetArchitecture
from koala.distillation.settings import DistillationSettings, StepSettings, Training


def per_sample(
    student: UNetArchitecture,
    teacher: UNetArchitecture | None,
    settings: DistillationSettings | StepSettings | None,
    training: Training,
    pixels: int,
    tokens: int | None = None,
    lora: bool = False,
) -> tuple[float, float]:
    """(all passes but those of activation checkpointing; what that recomputes), in FLOPs.

    settings: None for L_task alone. training: how steps alternate, if they train a critic. pixels:
    side of the image. tokens: of the prompt; None: the native length. lora: only a LoRA is trained.
    """
    own = forward_flops(student, pixels, pixels, tokens or student.tokens)
    theirs = 0
    if teacher is not None:
        theirs = forward_flops(teacher, pixels, pixels, tokens or teacher.tokens)
    guided = 2 if settings and settings.guidance else 1
    if isinstance(settings, StepSettings) and settings.trains_critic:  # a copy of the teacher
        updates, ahead = training.critic_updates, settings.steps - 1
        in_student = (ahead + 3) * own + (1 + guided) * theirs
        in_critic = (ahead + 1) * own + 3 * theirs
        both = updates + 1
        return (in_student + updates * in_critic) / both, (own + updates * theirs) / both
    if isinstance(settings, StepSettings) and settings.substeps is not None:
        return (settings.steps + 2) * own + guided * settings.substeps * theirs, own
    if isinstance(settings, StepSettings):
        return (settings.steps + 2) * own + 3 * theirs, own + theirs
    taught = settings is not None and settings.learns_from_teacher
    return (2 if lora else 3) * own + (guided * theirs if taught else 0), own
