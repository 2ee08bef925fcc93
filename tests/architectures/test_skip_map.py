"""Which of a teacher's residuals each of a student's skip connections takes."""

import pytest

from koala.architectures.block_map import block_map
from koala.architectures.layout import tensor_shapes
from koala.architectures.skip_map import readers, skip_connections, skip_map, with_layers
from koala.architectures.table import ARCHITECTURES, CUTS, student_of
from koala.errors import UserError

SDXL = ARCHITECTURES["sdxl"]


def test_sdxl_has_nine_skip_connections():
    assert skip_connections(SDXL) == [
        ("conv_in", 320), ("down_blocks.0.resnets.0", 320), ("down_blocks.0.resnets.1", 320),
        ("down_blocks.0.downsamplers.0", 320), ("down_blocks.1.resnets.0", 640),
        ("down_blocks.1.resnets.1", 640), ("down_blocks.1.downsamplers.0", 640),
        ("down_blocks.2.resnets.0", 1280), ("down_blocks.2.resnets.1", 1280),
    ]  # fmt: skip


@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.pooled])
def test_they_are_what_the_up_blocks_join(name):
    """The channels that each up resnet takes, less those that flow in, are a skip connection's."""
    arch = ARCHITECTURES[name]
    shapes, channels = tensor_shapes(arch), [c for _, c in skip_connections(arch)]
    flow = arch.widths[-1]
    for i, width in enumerate(reversed(arch.widths)):
        for j in range(arch.layers + 1):
            taken = shapes[f"up_blocks.{i}.resnets.{j}.conv1.weight"][1]
            assert taken - flow == channels.pop()
            flow = width
    assert not channels


@pytest.mark.parametrize("root", ["sdxl", "sdxl-mini"])
@pytest.mark.parametrize(
    ("cut", "expected"),
    [(cut, [0, 2, 3, 5, 6, 8, 9]) for cut in CUTS],
)
def test_a_students_places_take_what_their_readers_read_in_the_teacher(root, cut, expected):
    teacher = ARCHITECTURES[root]
    student = student_of(teacher, cut)
    assert skip_map(teacher, student) == expected
    assert skip_map(with_layers(student, teacher.layers), student) == expected
    inherited, theirs = block_map(teacher, student), readers(teacher)
    channels = [channels for _, channels in skip_connections(teacher)]
    for (_, own), reader, number in zip(
        skip_connections(student), readers(student), expected, strict=False
    ):
        assert (theirs[number], channels[number]) == (inherited[reader], own)


def test_a_model_takes_its_own_as_they_are():
    for arch in (SDXL, ARCHITECTURES["ssd-1b"], ARCHITECTURES["segmind-vega"]):
        assert skip_map(arch, arch) == list(range(10))
        assert skip_map(with_layers(arch, 2), arch) == list(range(10))
    with pytest.raises(UserError, match="cannot inherit"):
        skip_map(with_layers(SDXL, 1), SDXL)
