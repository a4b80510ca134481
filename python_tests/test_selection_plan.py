"""How a selection is laid out follows from the shapes, the element type and the device alone."""

import pytest
import torch
from emulator import build, calls, operations

FIELDS = (
    *("stored", "swept", "mma", "wgmma", "tile", "entries", "item_blocks"),
    *("groups", "group_blocks", "blocks", "lookahead"),
    *("wave_floats", "waves", "most_large", "drafted"),
)
NO_BOUND = 2**63 - 1


@pytest.fixture(scope="module")
def module():
    if reason := build.missing_tool():
        pytest.skip(reason)
    return build.module()


@pytest.fixture
def plan(module):
    def ask(batch, tokens, channels, packed=False, dtype="bfloat16", picks=None, max_seqlen=NO_BOUND):
        asked = (batch, tokens, channels, tokens if picks is None else picks, packed, max_seqlen)
        return {name: module.run(f"selection_plan_{dtype}", *asked, i) for i, name in enumerate(FIELDS)}

    return ask


def test_up_to_8192_tokens_weights_are_stored(plan):
    for tokens in (1, 576, 2880, 8192):
        assert plan(1, tokens, 1024)["stored"]
    assert not plan(1, 8193, 1024)["stored"]
    for tokens in (1, 8192, 8193, 10**6):  # packed: only the device knows how long items are
        at = plan(4, tokens, 1024, packed=True)
        assert at["stored"]
        assert bool(at["swept"]) == (tokens > 8192)
        bounded = plan(4, tokens, 1024, packed=True, max_seqlen=8192)
        assert bounded["stored"]
        assert not bounded["swept"]


def test_packed_weights_take_no_more_than_512_mib_in_as_many_waves_as_may_be_needed(plan):
    def waves(batch, tokens, max_seqlen=NO_BOUND):
        at = plan(batch, tokens, 64, packed=True, max_seqlen=max_seqlen)
        return at["waves"], at["wave_floats"]

    assert waves(4, 2304) == (1, 2304 * 2304)
    assert waves(6, 4022) == (1, 4022 * 4024)
    assert waves(64, 59_824) == (7, 1 << 27)
    assert waves(64, 59_824, 2880) == (3, 1 << 27)
    assert waves(64, 59_824, 576) == (1, 59_824 * 576)
    for batch, tokens, bound in ((3, 10**6, 8192), (10**5, 10**7, 700), (2, 16_384, 8191), (1, 1, 1)):
        most, floats = waves(batch, tokens, bound)
        assert floats <= 1 << 27
        side = min(tokens, bound)
        # The first item of a wave did not fit into the previous wave: two waves in a row hold more than `floats`.
        filled = -(-tokens * (side + -side % 4) // floats)
        assert most == min(batch, 2 * filled - 1)


def test_no_more_packed_items_are_swept_than_there_can_be(plan):
    def large(batch, tokens, **rest):
        return plan(batch, tokens, 64, packed=True, **rest)["most_large"]

    assert [large(64, tokens) for tokens in (8192, 8193, 16_385, 16_386)] == [0, 1, 1, 2]
    assert large(2, 10**6) == 2
    assert large(64, 10**6, max_seqlen=8192) == 0
    assert large(64, 10**6, max_seqlen=8193) == 64


def test_few_picks_of_many_tokens_are_made_in_sweeps(plan, monkeypatch):
    monkeypatch.setenv("STS_EMULATE_CAPABILITY", "80")

    def stored(tokens, picks, **rest):
        return plan(3, tokens, 1024, picks=picks, **{"dtype": "float32", **rest})["stored"]

    assert stored(8192, 128)
    assert not stored(8192, 127)
    assert stored(4096, 1)
    assert not stored(4097, 64)
    # Weights stay stored where the other kernel could make a different pick.
    assert stored(8192, 1, dtype="bfloat16")
    assert stored(8192, 1, packed=True)


def test_no_more_than_256_mib_of_weights_at_a_time(plan):
    for batch, tokens in ((1, 8192), (3, 8191), (64, 576), (1000, 577), (7, 2880)):
        entries = plan(batch, tokens, 64)["entries"]
        assert 1 <= entries <= batch
        floats = tokens * (tokens + -tokens % 4)  # rows start on 16 bytes
        assert entries * floats <= 1 << 26
        assert entries == batch or (entries + 1) * floats > 1 << 26


def test_hopper_takes_rows_of_any_type_and_alignment(plan, monkeypatch):
    for tokens in (1, 576, 8192):
        assert plan(2, tokens, 1001)["wgmma"]
    assert plan(2, 8192, 1001, dtype="float32", picks=1)["wgmma"]
    assert not plan(1, 8193, 1024)["wgmma"]
    for tokens in (1, 576, 20_000):  # packed: items of up to 8192 tokens
        for dtype in ("float32", "bfloat16"):
            assert plan(2, tokens, 1001, packed=True, dtype=dtype)["wgmma"]
    monkeypatch.setenv("STS_EMULATE_CAPABILITY", "80")
    assert not plan(2, 576, 1024)["wgmma"]


def test_hopper_takes_small_tiles_up_to_two_for_every_multiprocessor(plan, monkeypatch):
    monkeypatch.setenv("STS_EMULATE_SMS", "132")
    assert [plan(batch, 576, 1024)["tile"] for batch in (1, 5, 6)] == [64, 64, 128]  # 45 tiles an item
    assert [plan(1, tokens, 1024)["tile"] for tokens in (1408, 1409)] == [64, 128]  # 253, 276 tiles


def test_tensor_cores_take_16_bit_rows_of_whole_chunks(plan, monkeypatch):
    monkeypatch.setenv("STS_EMULATE_CAPABILITY", "80")
    for packed in (False, True):
        assert plan(2, 576, 1024, packed)["mma"]
        assert not plan(2, 576, 1024, packed, dtype="float32")["mma"]
        assert not plan(2, 576, 1001, packed)["mma"]
    # A pair's bits must not depend on the other packed items.
    assert plan(2, 10**9, (1 << 22) - 64, packed=True)["mma"]
    assert not plan(2, 1000, 1 << 22, packed=True)["mma"]


def test_large_tiles_where_there_are_two_for_every_multiprocessor(plan, monkeypatch):
    monkeypatch.setenv("STS_EMULATE_CAPABILITY", "80")
    monkeypatch.setenv("STS_EMULATE_SMS", "132")
    assert [plan(batch, 576, 1024)["tile"] for batch in (1, 17, 18, 64)] == [64, 64, 128, 128]  # 15 tiles an item
    assert [plan(1, tokens, 1024)["tile"] for tokens in (2688, 2816, 2880)] == [64, 64, 128]  # 231, 253, 276 tiles
    # Packed: as if items were equally long.
    assert [plan(batch, batch * 576, 1024, packed=True)["tile"] for batch in (4, 17, 18)] == [64, 64, 128]
    assert [plan(batch, 576, 1024, dtype="float32")["tile"] for batch in (1, 5, 6)] == [32, 32, 64]  # 45 tiles an item


def test_blocks_share_large_items_where_there_are_multiprocessors_for_it(plan, monkeypatch):
    monkeypatch.setenv("STS_EMULATE_SMS", "132")

    def item_blocks(batch, tokens, **rest):
        return plan(batch, tokens, 64, **rest)["item_blocks"]

    assert [item_blocks(1, tokens) for tokens in (1, 576, 1024, 1025, 2880, 8192)] == [1, 1, 1, 8, 8, 8]
    assert [item_blocks(batch, 1100) for batch in (1, 16, 17, 33, 34)] == [8, 8, 4, 4, 1]
    assert item_blocks(64, 2880) == 8  # eight at a time
    assert item_blocks(1, 2880, dtype="float32") == 8
    # Packed: the device knows which items are long, and shares as many as fit. None if items alone fill three quarters.
    assert [item_blocks(batch, 2880, packed=True) for batch in (1, 16, 17, 99, 100)] == [8, 8, 4, 4, 1]
    assert [item_blocks(64, 59_824, packed=True, max_seqlen=n) for n in (1024, 1025, 10_000)] == [1, 4, 4]
    assert item_blocks(4, 1024, packed=True) == 1
    monkeypatch.setenv("STS_EMULATE_SMS", "7")
    assert [item_blocks(batch, 1500) for batch in (1, 2)] == [4, 1]
    monkeypatch.setenv("STS_EMULATE_SMS", "3")
    assert item_blocks(1, 2880) == 1


def test_picks_are_drafted_where_codes_fit_shared_memory_and_pay_for_their_encoding(plan):
    def drafted(tokens, picks, batch=1, **rest):
        return bool(plan(batch, tokens, 64, picks=picks, **rest)["drafted"])

    assert not any(drafted(n, n // 2) for n in (128, 256, 641, 1024))
    assert all(drafted(n, n // 2) for n in (257, 576, 640))
    assert [drafted(576, k) for k in (1, 71, 72, 192, 576)] == [False, False, True, True, True]
    assert [drafted(300, k) for k in (63, 64)] == [False, True]
    assert drafted(576, 192, batch=300, dtype="float32")
    # Packed: by the longest item that there may be, and the mean of the picks.
    assert [drafted(4 * 576, 4 * 192, batch=4, packed=True, max_seqlen=n) for n in (576, 641)] == [True, False]
    assert not drafted(4 * 576, 4 * 192, batch=4, packed=True)
    assert not drafted(4 * 576, 4 * 60, batch=4, packed=True, max_seqlen=576)


@pytest.mark.parametrize("multiprocessors", [1, 4, 132])
def test_above_the_blocks_of_all_groups_are_resident(plan, monkeypatch, multiprocessors):
    monkeypatch.setenv("STS_EMULATE_SMS", str(multiprocessors))
    monkeypatch.setenv("STS_EMULATE_BLOCKS_PER_SM", "2")
    for batch in (1, 3, 100_000):
        for packed in (False, True):
            at = plan(batch, 20_000, 1024, packed)
            assert at["groups"] >= 1
            assert at["group_blocks"] >= 1
            assert at["groups"] <= min(batch, 2) if packed else at["groups"] <= batch
            assert at["blocks"] <= multiprocessors * 2
            assert at["blocks"] >= at["group_blocks"]  # packed: all of them for an item that is alone
            assert packed or at["blocks"] == at["groups"] * at["group_blocks"]
            assert (at["group_blocks"] - 1) * 128 < 20_000  # every block has a token
            assert at["lookahead"] == 32
            assert plan(batch, 20_000, 1024, packed, dtype="float32")["lookahead"] == 16
    assert plan(1, 20_000, 1024)["group_blocks"] == min(2 * multiprocessors, 157)  # the whole device for one item
    assert plan(1, 20_000, 1024, dtype="float32")["group_blocks"] == min(2 * multiprocessors, 79)


def test_weights_of_a_sweep_take_no_more_than_the_features(plan):
    for dtype, itemsize, most in (("float32", 4, 16), ("bfloat16", 2, 32)):
        for channels in (1, 8, 24, 64, 100, 1024, 5120):
            rows = plan(1, 20_000, channels, dtype=dtype)["lookahead"]
            assert 4 <= rows <= most
            assert rows == 4 or 4 * rows <= channels * itemsize


def test_a_cpu_stores_the_weights_of_a_few_tokens_of_which_most_are_picked(module):
    def stored(tokens, picks):
        return module.run("cpu_selection_plan", tokens, picks, tokens * 4096, 0)

    assert stored(576, 384)
    assert stored(1, 1)
    assert not stored(576, 383)
    assert stored(724, 724)
    assert not stored(725, 725)


def test_a_cpu_computes_more_rows_a_pass_where_the_features_leave_its_cache(module):
    assert module.run("cpu_selection_plan", 4096, 192, 4096 * 4096, 1) == 8
    assert module.run("cpu_selection_plan", 4097, 192, 4097 * 4096, 1) == 16


def test_hopper_stores_the_distances_of_a_set_to_itself(module, monkeypatch):
    """nearest and knn_density of 16-bit rows run on wgmma, which shows as mbarrier phases."""

    def phases(call):
        before = module.run("phases_begun")
        calls.run_in(module, call)
        return module.run("phases_begun") - before

    x = torch.randn(2, 70, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    wgmma = operations.nearest("own", x, x, "euclidean"), operations.knn_density("own", x, 3)
    others = (
        operations.nearest("two", x, x.clone(), "euclidean"),
        operations.nearest("own", x, x, "cosine"),
        operations.nearest("own", x.float(), x.float(), "euclidean"),
        operations.knn_density("own", x.float(), 3),
        operations.knn_density("own", x, 3, strip_rows=69),  # less than an item
    )
    assert all(phases(call) for call in wgmma)
    assert not any(phases(call) for call in others)
    monkeypatch.setenv("STS_EMULATE_CAPABILITY", "80")
    assert not any(phases(call) for call in wgmma)
