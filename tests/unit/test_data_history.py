import numpy as np
import torch

from distcl.data.history import History
from distcl.types import pack_ids


def test_history_keeps_ids_in_order_and_once():
    history = History()
    assert len(history) == 0 and history.ids().shape == (0,)
    history.add(pack_ids(0, [5, 2, 9]))
    history.add(pack_ids(1, [2, 2, 5]))
    history.add(pack_ids(0, [9, 1]))
    expected = [*pack_ids(0, [5, 2, 9]), *pack_ids(1, [2, 5]), *pack_ids(0, [1])]
    assert history.ids().tolist() == expected
    assert history.ids().dtype == np.int64 and len(history) == 6


def test_what_history_hands_out_is_not_what_it_keeps():
    history = History()
    given = pack_ids(0, [1, 2])
    history.add(given)
    given[0] = 7
    history.ids()[1] = 8
    assert history.ids().tolist() == [1, 2]


def test_history_survives_a_weights_only_checkpoint(tmp_path):
    history = History()
    history.add(pack_ids(3, [4, 1]))
    torch.save(history.state_dict(), tmp_path / "history.pt")
    again = History()
    again.add(pack_ids(0, [1]))
    again.load_state_dict(torch.load(tmp_path / "history.pt", weights_only=True))
    assert np.array_equal(again.ids(), history.ids())
    again.add(pack_ids(4, [0]))
    assert len(again) == 3 and len(history) == 2
