"""Pages of the documentation whose code is meant to run as it stands."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"


def sections(page, first, last):
    """The code of a page from one heading up to another."""
    text = (DOCS / page).read_text(encoding="utf-8")
    part = text[text.index(f"\n## {first}\n") : text.index(f"\n## {last}\n")]
    return re.findall(r"```python\n(.*?)```", part, re.DOTALL)


@pytest.mark.filterwarnings("ignore:Fewer filters", "ignore:Filters that lower")
def test_any_model():
    """Outputs, labels, batches and wrapped models, with the values that the comments promise."""
    torch.manual_seed(0)
    blocks = sections("any_model.md", "What the model returns", "torchvision's families")
    assert len(blocks) == 6
    names = {}
    for block in blocks:
        exec(compile(block, "any_model.md", "exec"), names)
    method, images, binary = names["method"], names["images"], names["binary"]
    assert method.identify([(images, names["several"])]).counts.tolist() == [4, 5, 5]
    on_one_logit = type(method)(binary, "1")
    for_class_1 = on_one_logit.attribute(images, target=1)
    assert torch.equal(on_one_logit.attribute(images, target=0), -for_class_1)
    assert torch.equal(on_one_logit.attribute(images), for_class_1)
    assert on_one_logit.identify([(images, names["labels"] % 2)]).scores.shape == (2, 8)


@pytest.mark.parametrize("page", ["identify.md", "class_filters.md"])
@pytest.mark.filterwarnings("ignore")
def test_first_block(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    exec(compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], page, "exec"), {})
