"""The presets have the sizes of the systems that their users come from."""

import pytest
import yaml

from conf.compose import FOLDER, choices_of
from conf.shape import ShapeConfig


def preset(name: str) -> ShapeConfig:
    return ShapeConfig.model_validate(
        yaml.safe_load((FOLDER / "shape" / f"{name}.yaml").read_text())
    )


def in_matrices(shape: ShapeConfig, vocabulary: int) -> int:
    """Parameters without norms, which those systems leave out when they count."""
    return shape.parameters(vocabulary) - (2 * shape.layers + 1) * shape.dim


@pytest.mark.parametrize(
    ("name", "vocabulary", "millions"),
    [
        # baby-llama2-chinese, 8 layers: 2 x 64,793 x 512 + 8 x (4 x 512^2 + 3 x 512 x 1376)
        ("92m", 64_793, 91.64),
        # baby-llama2-chinese, large: 64,793 x 1024 + 12 x (4 x 1024^2 + 3 x 1024 x 2752)
        ("218m", 64_793, 218.13),
        # Zero-Chatgpt: 2 x 32,006 x 512 + 24 x (4 x 512^2 + 3 x 512 x 2752)
        ("160m", 32_006, 159.39),
    ],
)
def test_shapes_of_known_systems_count_their_parameters(
    name: str, vocabulary: int, millions: float
) -> None:
    assert in_matrices(preset(name), vocabulary) / 1e6 == pytest.approx(millions, abs=0.006)


def test_presets_are_there_and_sound() -> None:
    assert {"tiny", "20m", "92m", "160m", "218m", "1b"} <= set(choices_of("shape"))
    for name in choices_of("shape"):
        preset(name)


def test_the_feed_forward_follows_multiple_of() -> None:
    # 8/3 x 512 = 1365.3: rounded up to multiples of 32 it is 1376, of 256 it is 1536
    assert ShapeConfig(dim=512, multiple_of=32).ffn_width == 1376
    assert ShapeConfig(dim=512, multiple_of=256).ffn_width == 1536
    assert ShapeConfig(dim=512, multiple_of=256, ffn=1000).ffn_width == 1000


def test_the_share_of_the_embeddings_counts_an_untied_head() -> None:
    # one layer of 8 wide, 2 heads of 4: 4 x 64 + 3 x 8 x 16 + 3 x 8 norms = 664; 10 x 8 per table
    shape = ShapeConfig(dim=8, layers=1, heads=2, kv_heads=2, ffn=16, context=8)
    assert shape.embedding_share(10) == pytest.approx(80 / 744)
    untied = shape.model_copy(update={"is_tied": False})
    assert untied.embedding_share(10) == pytest.approx(160 / 824)
