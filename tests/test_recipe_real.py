"""A recipe on the real 135M model, through export, in stock mergekit."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_kitchen import random_mask

from mftmerge.apply import apply_mask
from mftmerge.recipe.export import export


@pytest.mark.real_model
@pytest.mark.slow
def test_smollm2_through_stock_mergekit(smollm2: Path, tmp_path: Path) -> None:
    """Tied embeddings, bfloat16: a delta mask on an input, a mask on the result, two stages of stock mergekit."""
    random_mask(smollm2, 0, part="layers.2").save(tmp_path / "m.mask")
    apply_mask(random_mask(smollm2, 1, keep=0.5, part="mlp"), smollm2, tmp_path / "expert", check_base=False)
    (tmp_path / "r.yml").write_text(f"""
        merge_method: task_arithmetic
        base_model: {smollm2}
        models:
          - {{model: expert, mask: {{file: m.mask, on: delta}}, parameters: {{weight: 0.5}}}}
        mask: {{op: complement, of: [m.mask]}}
        parameters: {{lambda: 0.9}}
    """)
    report = export(tmp_path / "r.yml", tmp_path / "out", verify=True)
    assert report.verification is not None
    assert report.verification.weights > 130_000_000
