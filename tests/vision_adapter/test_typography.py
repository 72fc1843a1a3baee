"""Words as pictures."""

import numpy as np
import pytest

from core_llm.errors import UserError
from vision_adapter.typography import write


def test_all_words_fit_and_differ_from_others() -> None:
    short, long = (np.asarray(write(text)) for text in ("tea", "a much longer request " * 8))
    for picture in (short, long):
        assert picture.shape == (448, 448, 3)
        edge = np.concatenate([picture[:8].ravel(), picture[-8:].ravel(), picture[:, -8:].ravel()])
        assert edge.min() > 200, "ink at the edge: letters are cut off"
        assert picture.min() < 60
    assert (np.asarray(write("tea")) == short).all() and (short != long).any()


def test_more_text_than_room_is_refused() -> None:
    with pytest.raises(UserError, match="larger side"):
        write("word " * 2000, 128)
