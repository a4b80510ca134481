"""Errors that the checks of the emulated kernels must catch, each made in a copy of the sources by replacing text.

A mutant is caught where one of its calls gives a wrong result, or where the program ends with a message that has `says`
in it. Text that is no longer found exactly once is an error: then the mutant has to be brought up to date.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product, zip_longest
from pathlib import Path

from . import build, operations, primitives
from .calls import Call, Failure, run_program

WRONG = "wrong result"
RACE = "ThreadSanitizer: data race"
# heap-buffer-overflow, or what a far address happens to be: SEGV, heap-use-after-free
OVERRUN = "ERROR: AddressSanitizer: "
BOUNDS = "runtime error: index"
HANGS = "still running"
OVERTAKEN = "an earlier copy to the same place is under way"

ORDERS = ("fwd", "rev", "1", "2")  # the schedules of the tests
IMPATIENT = {"STS_EMULATE_STALL_SECONDS": "4"}


@dataclass(frozen=True)
class Mutant:
    name: str
    kernels: str  # the file of launchers/ to build, which is also the start of the names of the kernels to call
    file: str
    edits: tuple[tuple[str, str], ...]
    says: str = WRONG
    nonsense: bool = False  # caught only by invalid numbers in device memory

    def __str__(self):
        return f"{self.kernels}-{self.name}"

    @property
    def sanitizer(self) -> str:
        return {RACE: "thread", OVERRUN: "address", BOUNDS: "address"}.get(self.says, "")

    def rounds(self) -> Iterator[list[Call]]:
        """Its calls, one of each kernel and way a round. Most mutants are caught in the first rounds."""
        if self.kernels == "primitives":
            yield primitives.calls()
            return
        groups: dict[tuple, list[Call]] = {}
        for call in operations.nonsense() if self.nonsense else operations.quick():
            if call.kernel.startswith(self.kernels):
                groups.setdefault((call.kernel, call.way), []).append(call)
        for calls in zip_longest(*groups.values()):
            yield [call for call in calls if call]


def mutant(name, kernels, file, *edits, **rest) -> Mutant:
    return Mutant(name, kernels, file, tuple(edits), **rest)


MUTANTS = (
    # Code that all kernels share.
    mutant(
        "no barrier before the partial minima are read",
        "repulsion_step",
        "rows.cuh",
        ("  __syncthreads();\n  return warp_lowest(lane < warps", "  return warp_lowest(lane < warps"),
    ),
    mutant(
        "one buffer of partial minima",
        "repulsion_step",
        "rows.cuh",
        ("partial[call & 1][warp] = key;", "partial[0][warp] = key;"),
        ("partial[call & 1][lane] : kNoKey", "partial[0][lane] : kNoKey"),
        says=RACE,
    ),
    mutant(
        "a vector load past the end of a row",
        "pairwise_sqdist",
        "rows.cuh",
        ("if (aligned && c + kSize <= channels) {", "if (aligned && c < channels) {"),
        says=OVERRUN,
    ),
    mutant(
        "one channel too many",
        "repulsion_step",
        "rows.cuh",
        ("if (c + i >= channels) continue;", "if (c + i > channels) continue;"),
        says=OVERRUN,
    ),
    mutant(
        "no check of num_tokens",
        "repulsion_select",
        "items.h",
        ("item.valid = item.tokens >= 0 && item.tokens <= tokens;", "item.valid = item.tokens >= 0;"),
        says="exit status",  # a wild address, with or without a sanitizer
        nonsense=True,
    ),
    # Distances.
    mutant(
        "no barrier before a stage is overwritten",
        "pairwise_sqdist",
        "sqdist_tiles.cuh",
        ("c0 += kChannels) {\n      __syncthreads();\n", "c0 += kChannels) {\n"),
    ),
    mutant(
        "no barrier before a stage is read",
        "pairwise_sqdist",
        "sqdist_tiles.cuh",
        (
            "      __syncthreads();\n      if (c0 + kChannels < channels) fetch",
            "      if (c0 + kChannels < channels) fetch",
        ),
    ),
    mutant(
        "a stage one channel short",
        "pairwise_sqdist",
        "sqdist_tiles.cuh",
        ("float a[kChannels][kTile + 4], b[kChannels]", "float a[kChannels - 1][kTile + 4], b[kChannels - 1]"),
        says=BOUNDS,
    ),
    mutant(
        "one row too many is stored",
        "pairwise_sqdist",
        "sqdist_tiles.cuh",
        ("if (i >= tokens || j >= tokens) continue;", "if (i > tokens || j >= tokens) continue;"),
        says=OVERRUN,
    ),
    # Distances on tensor cores.
    mutant(
        "no wait for a stage",
        "repulsion_select",
        "sqdist_mma.cuh",
        ("cp_async_wait<kMmaStages - 2>();", ""),
        says=OVERTAKEN,
    ),
    mutant(
        "a wait that is one stage too short",
        "repulsion_select",
        "sqdist_mma.cuh",
        ("cp_async_wait<kMmaStages - 2>();", "cp_async_wait<kMmaStages - 1>();"),
    ),
    mutant(
        "copies that are never committed",
        "repulsion_select",
        "sqdist_mma.cuh",
        ("cp_async_commit();", ""),
        says=OVERTAKEN,
    ),
    mutant(
        "no barrier between a stage's arrival and its use",
        "repulsion_select",
        "sqdist_mma.cuh",
        ("cp_async_wait<kMmaStages - 2>();\n      __syncthreads();", "cp_async_wait<kMmaStages - 2>();"),
    ),
    mutant(
        "a stage too few",
        "repulsion_select",
        "sqdist_mma.cuh",
        ("constexpr int kMmaStages = 3;", "constexpr int kMmaStages = 2;"),
        ("cp_async_wait<kMmaStages - 2>();", "cp_async_wait<kMmaStages - 1>();"),
    ),
    mutant(
        "only one thread's marks count",
        "repulsion_select",
        "sqdist_mma.cuh",
        ("marked = __any_sync(kFullWarp, marked);", ""),
    ),
    mutant(
        "marks of a large tile count for its first quarter",
        "repulsion_select",
        "sqdist_mma.cuh",
        ("any |= warp_marked[wr][wc];", "any |= mi + mj == 0 && warp_marked[wr][wc];"),
    ),
    mutant(
        "marks read before the warps have written them",
        "repulsion_select",
        "sqdist_mma.cuh",
        ("__syncthreads();  // also: no thread is still", "// also: no thread is still"),
        says=RACE,
    ),
    mutant(
        "the centre is left out of the columns",
        "repulsion_select",
        "sqdist_mma.cuh",
        ("      common.subtract_from_b(b[n]);\n", ""),
    ),
    # Distances on Hopper's tensor cores.
    mutant(
        "a stage is filled before it is empty",
        "pairwise_sqdist",
        "sqdist_wgmma.cuh",
        ("if (turn > 0) mbarrier_wait(&empty[stage], turn - 1);", ""),
        says="more arrivals than the phase counts",
    ),
    mutant(
        "a wait for the phase before",
        "pairwise_sqdist",
        "sqdist_wgmma.cuh",
        ("mbarrier_wait(&full[stage], turn);", "mbarrier_wait(&full[stage], turn > 0 ? turn - 1 : 0);"),
        says="deadlock",
    ),
    mutant(
        "a stage is given back while it is multiplied",
        "pairwise_sqdist",
        "sqdist_wgmma.cuh",
        ("          wgmma_wait<1>();\n", ""),
    ),
    mutant(
        "products are read before they end",
        "pairwise_sqdist",
        "sqdist_wgmma.cuh",
        ("      wgmma_finish(run);\n", ""),
    ),
    mutant(
        "one warp gives a stage back for all",
        "pairwise_sqdist",
        "sqdist_wgmma.cuh",
        ("mbarrier_init(&empty[threadIdx.x], kBlocks * kWarps);", "mbarrier_init(&empty[threadIdx.x], kBlocks);"),
        ("if (lane == 0) mbarrier_arrive(&empty[used]);", "if (threadIdx.x == 0) mbarrier_arrive(&empty[used]);"),
        ("if (lane < kBlocks) mbarrier_arrive_at(", "if (threadIdx.x < kBlocks) mbarrier_arrive_at("),
    ),
    mutant(
        "a stage is given back to the own producer alone",
        "pairwise_sqdist",
        "sqdist_wgmma.cuh",
        ("mbarrier_arrive_at(&empty[used], lane);", "mbarrier_arrive(&empty[used]);"),
        says=RACE,
    ),
    mutant(
        "a block ends while the other may arrive",
        "pairwise_sqdist",
        "sqdist_wgmma.cuh",
        ("  if constexpr (kBlocks > 1) meet_cluster();\n#endif", "#endif"),
        says="that block has ended",
    ),
    mutant(
        "both blocks multicast the same columns",
        "pairwise_sqdist",
        "sqdist_wgmma.cuh",
        ("part, column0 + rank * kBoxRows, entry,", "part, column0, entry,"),
    ),
    mutant(
        "two tiles of the diagonal share columns",
        "pairwise_sqdist",
        "sqdist_wgmma.cuh",
        ("kBlocks > 1 && tile.one_column;", "kBlocks > 1;"),
    ),
    mutant(
        "a block without a tile does not wait for the other",
        "pairwise_sqdist",
        "sqdist_wgmma.cuh",
        ("(kTileCluster<kTile> > 1 ? tile.lower_j : tile.j) <", "tile.j <"),
        says="deadlock",
    ),
    mutant(
        "columns come unannounced",
        "pairwise_sqdist",
        "sqdist_wgmma.cuh",
        ("(row0 == column0 ? 1 : 2) * kSide * 2", "kSide * 2"),
        says="before all copies into its shared memory have come",
    ),
    mutant(
        "runs that go on where the last one ended",
        "pairwise_sqdist",
        "sqdist_wgmma.cuh",
        ("wgmma(run, a, b, k, step + k > 0);", "wgmma(run, a, b, k, begin + step + k > 0);"),
    ),
    mutant(
        "marked pairs read before all lanes have stored them",
        "pairwise_sqdist",
        "sqdist_wgmma.cuh",
        ("  __syncwarp();  // all lanes have stored what they marked\n", ""),
        says=RACE,
    ),
    mutant(
        "a marked pair repaired once",
        "pairwise_sqdist",
        "sqdist_wgmma.cuh",
        ("          matrix[column[p] * pitch + row] = value;\n", ""),
    ),
    mutant(
        "the centre is left in the norms",
        "repulsion_select",
        "token_stats.cuh",
        (", from_centre = x[u][v] - centre_vec[u][v];", ", from_centre = x[u][v];"),
    ),
    mutant(
        "column minima read before all warps have lowered them",
        "repulsion_select",
        "sqdist_wgmma.cuh",
        ("  mbarrier_wait(met, meeting);\n", ""),
        says=RACE,
    ),
    mutant(
        "a tile of another item",
        "pairwise_sqdist",
        "sqdist_wgmma.cuh",
        ("const int entry = static_cast<int>(tile.entry),", "const int entry = static_cast<int>(tile.entry & ~1),"),
    ),
    mutant(
        "one thread looks for the producer's tiles",
        "repulsion_select",
        "sqdist_wgmma.cuh",
        ("warp == kWarps && index < end;", "threadIdx.x == kWarps * 32 && index < end;"),
        says="lanes of one warp are at different collectives",
    ),
    mutant(
        "boxes of the first packed rows",
        "repulsion_select",
        "sqdist_wgmma.cuh",
        ("row0 = static_cast<int>(tile.row + tile.i);", "row0 = static_cast<int>(tile.i);"),
    ),
    mutant(
        "columns of the next packed item are stored",
        "repulsion_select",
        "sqdist_wgmma.cuh",
        ("row0 != column0 && column0 + kTile <= width &&", "row0 != column0 &&"),
        says=OVERRUN,
    ),
    mutant(
        "rows of the next packed item are stored",
        "repulsion_select",
        "sqdist_wgmma.cuh",
        ("if (row > column || column >= width) continue;", "if (row > column) continue;"),
        says=OVERRUN,
    ),
    mutant(
        "a marked pair of the first packed rows",
        "repulsion_select",
        "sqdist_wgmma.cuh",
        ("item_rows.data = rows.row(tile.entry, tile.row);", "item_rows.data = rows.row(tile.entry, 0);"),
    ),
    mutant(
        "marks past the end of the item are repaired",
        "repulsion_select",
        "sqdist_wgmma.cuh",
        ("column > row && column < width ? matrix", "column > row ? matrix"),
        says=OVERRUN,
    ),
    mutant(
        "norms of the first item",
        "repulsion_select",
        "sqdist_wgmma.cuh",
        ("width, norms + tile.token);", "width, norms);"),
    ),
    mutant(
        "the centre of the first item",
        "repulsion_select",
        "token_stats.cuh",
        (
            "static_cast<const scalar_t*>(stats.centre) + b * rows.channels;",
            "static_cast<const scalar_t*>(stats.centre);",
        ),
    ),
    # A step.
    mutant(
        "a lane writes what others have yet to read",
        "repulsion_step",
        "repulsion_step.cuh",
        ("__syncwarp();", ""),
        says=RACE,
    ),
    mutant(
        "blocks compare without an atomic",
        "repulsion_step",
        "repulsion_step.cuh",
        ("atomicMin(lowest + b, best);", "lowest[b] = lower(lowest[b], best);"),
        says=RACE,
    ),
    mutant(
        "the last tokens have no block",
        "repulsion_step",
        "repulsion_step.cuh",
        ("ceil_div(tokens, kStepThreads / 32)", "1 + (tokens - 2) / (kStepThreads / 32)"),
    ),
    mutant(
        "a barrier that not all threads reach",
        "repulsion_step",
        "repulsion_step.cuh",
        (
            "best = block_lowest(best, partial, calls++);",
            "if (i < tokens) best = block_lowest(best, partial, calls++);",
        ),
    ),
    mutant(
        "a shuffle that not all lanes reach",
        "repulsion_step",
        "repulsion_step.cuh",
        ("sum = warp_sum(sum);", "if (lane < 16) sum = warp_sum(sum);"),
        says="lanes of one warp are at different collectives",
    ),
    # The rows of two sets.
    mutant(
        "no barrier before a stage of pairs is overwritten",
        "nearest",
        "row_pairs.cuh",
        ("        __syncthreads();  // all threads have read the previous stage\n", ""),
    ),
    mutant(
        "no barrier before a stage of pairs is read",
        "nearest",
        "row_pairs.cuh",
        ("        __syncthreads();  // stage complete\n", ""),
    ),
    mutant(
        "blocks lower a key without an atomic",
        "nearest",
        "nearest.cuh",
        (
            "if (low != kNoKey) atomicMin(best + entry * rows + i, low);",
            "if (low != kNoKey) best[entry * rows + i] = lower(best[entry * rows + i], low);",
        ),
        says=RACE,
    ),
    mutant(
        "a key that does not count is matched",
        "nearest",
        "nearest.cuh",
        ("if (!query.valid() || !key.valid())", "if (!query.valid())"),
    ),
    mutant(
        "a key of equal rank is matched",
        "nearest",
        "nearest.cuh",
        ("(key_rank[entry * count + j] < ", "(key_rank[entry * count + j] <= "),
    ),
    mutant(
        "pairs past the last key",
        "nearest",
        "nearest.cuh",
        ("j >= count || ", "j > count || "),
        says=OVERRUN,
    ),
    mutant(
        "stored distances of the first entries",
        "nearest",
        "nearest.cuh",
        ("entry = first + r / pairs.rows", "entry = r / pairs.rows"),
    ),
    mutant(
        "no check of num_keys",
        "nearest",
        "row_pairs.cuh",
        ("(counts[b] <= count && i < counts[b])", "i < counts[b]"),
        nonsense=True,
    ),
    mutant(
        "no barrier before a stage of products is used",
        "nearest",
        "row_pairs_mma.cuh",
        ("cp_async_wait<kMmaStages - 2>();\n        __syncthreads();", "cp_async_wait<kMmaStages - 2>();"),
    ),
    mutant(
        "rows out of range are multiplied as they are",
        "nearest",
        "row_pairs_mma.cuh",
        ("if (nonzero && (x.scale", "if (false && (x.scale"),
    ),
    mutant(
        "the last lanes of a row do not offer",
        "nearest",
        "row_pairs_mma.cuh",
        ("offset < 4;", "offset < 2;"),
    ),
    # Means.
    mutant(
        "no barrier before the list of tokens is replaced",
        "scatter_mean",
        "scatter_mean.cuh",
        ("        __syncthreads();  // all threads have read the previous list\n", ""),
        says=RACE,
    ),
    mutant(
        "assignments past the last token",
        "scatter_mean",
        "scatter_mean.cuh",
        ("i < tokens && slots[", "slots["),
        says=OVERRUN,
    ),
    mutant(
        "no check of the assignment",
        "scatter_mean",
        "scatter_mean.cuh",
        ("slot >= 0 && slot < count && w - w == 0.f", "w - w == 0.f"),
        nonsense=True,
    ),
    mutant(
        "a token listed by every warp of its round",
        "scatter_mean",
        "scatter_mean.cuh",
        ("members[num_members + __popc(", "members[__popc("),
    ),
    # Densities.
    mutant(
        "bins are read before all have counted",
        "knn_density",
        "knn_density.cuh",
        ("1u);\n      __syncthreads();\n", "1u);\n"),
        says=RACE,
    ),
    mutant(
        "equal distances count once",
        "knn_density",
        "knn_density.cuh",
        ("static_cast<double>(rank) * ", ""),
    ),
    mutant(
        "the bin is looked for among all tokens",
        "knn_density",
        "knn_density.cuh",
        (" && (values[j] & known) == prefix", ""),
    ),
    mutant(
        "distances past the last token count",
        "knn_density",
        "knn_density.cuh",
        ("num_tokens ? num_tokens[entry] : count", "count"),
    ),
    # A selection.
    mutant(
        "a token is finite if the channels of a thread are",
        "repulsion_select",
        "token_stats.cuh",
        ("if (__syncthreads_or(probe != 0.f)) finite", "if (probe != 0.f) finite"),
    ),
    # A selection over stored weights.
    mutant(
        "rows in shared memory are not waited for",
        "repulsion_select",
        "select_stored.cuh",
        ("      cp_async_wait<0>();\n", ""),
    ),
    mutant(
        "rows that other threads copy are not waited for",
        "repulsion_select",
        "select_stored.cuh",
        ("      __syncthreads();  // all threads have waited for their copies\n", ""),
        says=RACE,
    ),
    mutant(
        "the start of the matrix in place of each of its vectors",
        "repulsion_select",
        "select_stored.cuh",
        ("cp_async_16(rows + i, matrix + i, true)", "cp_async_16(rows + i, matrix, true)"),
    ),
    mutant(
        "the last of equal tokens wins",
        "repulsion_select",
        "select_stored.cuh",
        ("for (int t = kTokens - 1; t >= 0; --t) lowest_t", "for (int t = 0; t < kTokens; ++t) lowest_t"),
    ),
    mutant(
        "the last of equal lanes reports",
        "repulsion_select",
        "select_stored.cuh",
        ("(equal & ((2u << lane) - 1)) == 1u << lane", "equal >> lane == 1u"),
    ),
    mutant(
        "one buffer of the warps' reports",
        "repulsion_select",
        "select_stored.cuh",
        ("report[step & 1][warp] =", "report[0][warp] ="),
        ("lowest_report<kWarps>(report[step & 1]", "lowest_report<kWarps>(report[0]"),
        says=RACE,
    ),
    mutant(
        "a picked token can be picked again",
        "repulsion_select",
        "selection.cuh",
        ("diagonal ? kInfinity : stored_value(rule, sqdist);", "stored_value(rule, sqdist);"),
    ),
    mutant(
        "more of a row is read than there is",
        "repulsion_select",
        "select_stored.cuh",
        ("(j < tokens ? j : (tokens - 1) & ~3)", "(j)"),
        says=OVERRUN,
    ),
    # Drafts.
    mutant(
        "codes are read while others write them",
        "repulsion_select",
        "select_drafted.cuh",
        ("  __syncthreads();\n  if (warp >= kDraftWarps) return;", "  if (warp >= kDraftWarps) return;"),
        says=RACE,
    ),
    mutant(
        "candidates are read while others write them",
        "repulsion_select",
        "select_drafted.cuh",
        ("    __syncthreads();\n    const uint2 two", "    const uint2 two"),
        says=OVERRUN,  # tokens that are not there yet
    ),
    mutant(
        "drafts are judged by reports that are not there yet",
        "repulsion_select",
        "select_drafted.cuh",
        ("    __syncthreads();\n    if (lane < drafts) report", "    if (lane < drafts) report"),
        says=RACE,
    ),
    mutant(
        "drafts are not judged",
        "repulsion_select",
        "select_drafted.cuh",
        ("static_cast<int>(report.token) == next_draft;", "next_draft >= 0;"),
    ),
    mutant(
        "a draft is judged by the row of its own",
        "repulsion_select",
        "select_drafted.cuh",
        (
            "lowest_report<kDraftWarps>(exchange->report[lane]",
            "lowest_report<kDraftWarps>(exchange->report[lane > 0 ? lane - 1 : 0]",
        ),
    ),
    mutant(
        "rows of drafts that were wrong are added",
        "repulsion_select",
        "select_drafted.cuh",
        ("if (p >= accepted) break;", "if (p >= drafts) break;"),
    ),
    mutant(
        "the last of equal tokens of a thread",
        "repulsion_select",
        "select_drafted.cuh",
        ("if (order <= low[p])", "if (order < low[p])"),
    ),
    mutant(
        "weights past the end of a draft's row",
        "repulsion_select",
        "select_drafted.cuh",
        ("        if (tid + t * kDraftThreads < tokens) row", "        row"),
        says=OVERRUN,
    ),
    mutant(
        "codes of weights past the end of the row",
        "repulsion_select",
        "select_drafted.cuh",
        ("if (column >= layout.circle) column -= layout.circle;", ""),
        says=OVERRUN,
    ),
    # Packed items.
    mutant(
        "weights of packed items start anywhere",
        "repulsion_select",
        "packed_plan.cuh",
        (
            "floats = stored ? item.tokens * matrix_pitch(item.tokens) : 0",
            "floats = stored ? item.tokens * item.tokens : 0",
        ),
        says="misaligned address",
    ),
    mutant(
        "no barrier before the sums of other warps are read",
        "repulsion_select",
        "packed_plan.cuh",
        ("    if (lane == 0) value[i] = 0;\n  }\n  __syncthreads();\n", "    if (lane == 0) value[i] = 0;\n  }\n"),
        says=RACE,
    ),
    mutant(
        "items past the first threads forget those before",
        "repulsion_select",
        "packed_plan.cuh",
        ("if (w == warp) value[i] = op(carry[i], value[i]);", "if (w == warp && w) value[i] = op(carry[i], value[i]);"),
    ),
    mutant(
        "no barrier before a wave's begin is read",
        "repulsion_select",
        "packed_plan.cuh",
        ("      __syncthreads();\n      wave_begin = opened_at;", "      wave_begin = opened_at;"),
    ),
    mutant(
        "a wave has one item more than fits",
        "repulsion_select",
        "packed_plan.cuh",
        ("sum[0] + floats - wave_begin <= shape.floats", "sum[0] - wave_begin <= shape.floats"),
        says=OVERRUN,
    ),
    mutant(
        "items may overlap",
        "repulsion_select",
        "packed_plan.cuh",
        ("item.valid && item.first >= before[0] && item.out >= before[1]", "item.valid"),
        nonsense=True,
    ),
    mutant(
        "no bound on the length of an item",
        "repulsion_select",
        "items.h",
        (" && end - item.first <= max_seqlen", ""),
        says=HANGS,  # an item that fits no wave
        nonsense=True,
    ),
    mutant(
        "tiles of the item before",
        "repulsion_select",
        "pair_tiles.cuh",
        ("matrices[i].first_tile <= number", "matrices[i].first_tile < number"),
    ),
    mutant(
        "tiles of the first wave",
        "repulsion_select",
        "pair_tiles.cuh",
        ("return wave[0].tile * parts * parts + blockIdx.x;", "return blockIdx.x;"),
    ),
    mutant(
        "marks of another tile",
        "repulsion_select",
        "pair_tiles.cuh",
        ("return (index * kParts + i) * kParts + j;", "return (index + i) * kParts + j;"),
    ),
    mutant(
        "items too long for weights are taken for stored ones",
        "repulsion_select",
        "select_stored.cuh",
        (" && matrices[b].offset >= 0 ? b : -1", " ? b : -1"),
        says="misaligned address",
    ),
    mutant(
        "a chunk of tokens of the item before",
        "repulsion_select",
        "packed_plan.cuh",
        ("return first_task(i) <= task;", "return first_task(i) < task;"),
    ),
    # A selection by a cluster.
    mutant(
        "all blocks of a cluster have the item of one",
        "repulsion_select",
        "select_cluster.cuh",
        ("  if (cluster.block_rank() > 0) return;\n", ""),
        says=RACE,
    ),
    mutant(
        "too few warps for an item that is not shared",
        "repulsion_select",
        "select_cluster.cuh",
        ("2 * kClusterFromWarps", "kClusterFromWarps"),
    ),
    mutant(
        "no wait but for the first reports",
        "repulsion_select",
        "select_cluster.cuh",
        ("mbarrier_wait(arrivals, exchange / 2);", "if (exchange < 2) mbarrier_wait(arrivals, 0);"),
        says=RACE,
    ),
    mutant(
        "one buffer of reports",
        "repulsion_select",
        "select_cluster.cuh",
        ("store_async(&shared->message[exchange & 1]", "store_async(&shared->message[0]"),
        ("shared->message[exchange & 1][thread.lane] :", "shared->message[0][thread.lane] :"),
        says=RACE,
    ),
    mutant(
        "a report while lanes are busy with the sweep before",
        "repulsion_select",
        "select_cluster.cuh",
        ("__syncwarp();  // all lanes have read", "// all lanes have read"),
        says=RACE,
    ),
    mutant(
        "rows come unannounced",
        "repulsion_select",
        "select_cluster.cuh",
        (" + inserts * row_bytes);", ");"),
        says=RACE,
    ),
    mutant(
        "nothing is bounded",
        "repulsion_select",
        "select_cluster.cuh",
        ("float bound = candidate_potential<Rule>(lowest_outside);", "float bound = kInfinity;"),
    ),
    mutant(
        "a tie with the bound",
        "repulsion_select",
        "select_cluster.cuh",
        ("!(candidate_potential<Rule>(best) < bound)", "!(candidate_potential<Rule>(best) <= bound)"),
    ),
    mutant(
        "the weight of another way",
        "repulsion_select",
        "select_cluster.cuh",
        ("of_chosen[h * 32];", "of_chosen[0];"),
    ),
    mutant(
        "a row is read before it is there",
        "repulsion_select",
        "select_cluster.cuh",
        ("born[h] = h == way ? -1 : candidate", "born[h] = candidate"),
        says=RACE,
    ),
    mutant(
        "the weights of the row that came first",
        "repulsion_select",
        "select_cluster.cuh",
        ("born[h] > chosen.inserted()", "born[h] < chosen.inserted()"),
    ),
    mutant(
        "a candidate that has just come is evicted",
        "repulsion_select",
        "select_cluster.cuh",
        ("if (h != pending && potential[h] > victim_potential)", "if (potential[h] > victim_potential)"),
    ),
    mutant(
        "a candidate that has left is forgotten",
        "repulsion_select",
        "select_cluster.cuh",
        ("is_candidate &= ~(1u << t);", ";"),
    ),
    # Launches that overlap.
    mutant(
        "picks that do not wait for the weights",
        "repulsion_select",
        "select_stored.cuh",
        (
            "  await_predecessor();\n  const int64_t b = stored.number(blockIdx.x);\n  select_stored",
            "  const int64_t b = stored.number(blockIdx.x);\n  select_stored",
        ),
        says="before await_predecessor",
    ),
    mutant(
        "distances that do not wait for the mean",
        "repulsion_select",
        "token_stats.cuh",
        (
            "Items items, bool aligned, TokenStats stats) {\n  await_predecessor();\n",
            "Items items, bool aligned, TokenStats stats) {\n",
        ),
        says="before await_predecessor",
    ),
    mutant(
        "distances by wgmma that do not wait for the copy of the rows",
        "pairwise_sqdist",
        "sqdist_wgmma.cuh",
        ("  await_predecessor();\n", ""),
        says="before await_predecessor",
    ),
    # A streaming selection.
    mutant(
        "one buffer of what blocks have lowest",
        "repulsion_select",
        "select_swept.cuh",
        ("(buffer++ & 1) * blocks * kMostSweepPoints", "0"),
        says=RACE,
    ),
    mutant(
        "no barrier before the lowest of all blocks is found",
        "repulsion_select",
        "select_swept.cuh",
        ("    barrier.sync();\n    // Each warp reduces", "    // Each warp reduces"),
        says=RACE,
    ),
    mutant(
        "no barrier between the distances of the candidates and the draft",
        "repulsion_select",
        "select_swept.cuh",
        ("barrier.sync();\n      for (int e = tid * 4", "__syncthreads();\n      for (int e = tid * 4"),
        says=RACE,
    ),
    mutant(
        "no barrier after the picks are added",
        "repulsion_select",
        "select_swept.cuh",
        ("    offer(low);\n    barrier.sync();", "    offer(low);"),
        says=RACE,
    ),
    mutant(
        "no barrier before the lowest of all warps is found",
        "repulsion_select",
        "select_swept.cuh",
        ("lowest_of_warp[warp()][lane()] = lowest;\n    __syncthreads();", "lowest_of_warp[warp()][lane()] = lowest;"),
        says=RACE,
    ),
    mutant(
        "no barrier before a block's offers are read",
        "repulsion_select",
        "select_swept.cuh",
        ("    __syncthreads();\n    if (warp() != 0) return;", "    if (warp() != 0) return;"),
        says=RACE,
    ),
    mutant(
        "distances of the candidates are drafted from before they are there",
        "repulsion_select",
        "select_swept.cuh",
        ("      __syncthreads();\n      if (warp() == 0) draft_picks", "      if (warp() == 0) draft_picks"),
        says=RACE,
    ),
    mutant(
        "no barrier before the parts of a pair's product are added",
        "repulsion_select",
        "sqdist_sweep.cuh",
        ("      __syncthreads();\n      const int i = ti", "      const int i = ti"),
        says=RACE,
    ),
    mutant(
        "no barrier before the parts of a pair's product are overwritten",
        "repulsion_select",
        "sqdist_sweep.cuh",
        ("      __syncthreads();  // all have read `part` before the next tile overwrites it\n", ""),
        says=RACE,
    ),
    mutant(
        "the potentials after a pick too many",
        "repulsion_select",
        "select_swept.cuh",
        (
            "share.after[(accepted - 1) * share.stride + i]",
            "share.after[(accepted < shared.draft.count ? accepted : accepted - 1) * share.stride + i]",
        ),
    ),
    mutant(
        "drafts are not verified",
        "repulsion_select",
        "select_swept.cuh",
        (
            "return __ffs(static_cast<int>(~__ballot_sync(kFullWarp, right)))",
            "return draft.count",
        ),
    ),
    mutant(
        "a picked token can be picked again in a sweep",
        "repulsion_select",
        "select_swept.cuh",
        (
            "value = i == draft.token[p] ? kInfinity : Rule::add(value, weights[p]);",
            "value = Rule::add(value, weights[p]);",
        ),
    ),
    mutant(
        "blocks that wait for blocks that are not resident",
        "repulsion_select",
        "selection.cuh",
        ("shared_bytes, 1, true, stream_};", "shared_bytes, 1, false, stream_};"),
        says="deadlock",
    ),
    mutant(
        "no wait for a stage of a sweep",
        "repulsion_select",
        "sqdist_sweep.cuh",
        ("cp_async_wait<kStages - 2>();", ""),
        says=OVERTAKEN,
    ),
    mutant(
        "no barrier before a stage of a sweep is used",
        "repulsion_select",
        "sqdist_sweep.cuh",
        ("cp_async_wait<kStages - 2>();\n      __syncthreads();", "cp_async_wait<kStages - 2>();"),
    ),
    mutant(
        "products read before all lanes have written them",
        "repulsion_select",
        "sqdist_sweep.cuh",
        ("      __syncwarp();\n      float* const row", "      float* const row"),
    ),
    mutant(
        "the centre is left out of the points",
        "repulsion_select",
        "sqdist_sweep.cuh",
        ("          centre_fragment.subtract_from_b(b[0]);\n", ""),
    ),
    mutant(
        "the distance of a marked pair goes to the next token",
        "repulsion_select",
        "sqdist_sweep.cuh",
        ("lane == owner) row[p] = weigh", "lane == (owner + 1) % 16) row[p] = weigh"),
    ),
    mutant(
        "the lowest of a warp is that of its first lane",
        "repulsion_select",
        "select_swept.cuh",
        ("low) << 32 | (first + owner)", "low) << 32 | first"),
    ),
    # Other rules than repulsion.
    mutant(
        "a pick is not marked",
        "farthest_select",
        "rule.cuh",
        ("return stored == kInfinity ? kInfinity : Rule::add(", "return Rule::add("),
    ),
    mutant(
        "a candidate without its quality",
        "farthest_select",
        "select_cluster.cuh",
        ("parameter[h] = message.parameter;", ""),
    ),
    mutant(
        "the quality of another lane's token",
        "farthest_select",
        "select_cluster.cuh",
        ("candidate_of(lowest).token() % 32);", "0);"),
    ),
    mutant(
        "the threshold of another candidate",
        "suppress_select",
        "select_cluster.cuh",
        ("__shfl_sync(kFullWarp, of_lane[0], slot % 32)", "__shfl_sync(kFullWarp, of_lane[0], 0)"),
    ),
    mutant(
        "a zero row is as near as any",
        "unit_rows",
        "unit_rows.cuh",
        ("(c + v == 0 ? zero_mark : 0.f)", "0.f"),
    ),
    mutant(
        "the last channels are not written",
        "unit_rows",
        "unit_rows.cuh",
        ("if (c + v >= pitch) continue;", "if (c + v >= rows.channels) continue;"),
    ),
    # Barriers between blocks.
    mutant(
        "the arrival does not release",
        "primitives",
        "device.cuh",
        ("add_release(counter_, 1);", "atomicAdd(counter_, 1u);"),
        says=RACE,
    ),
    mutant(
        "the departure does not acquire",
        "primitives",
        "device.cuh",
        ("load_acquire(counter_) - target_", "*const_cast<volatile unsigned*>(counter_) - target_"),
        says=RACE,
    ),
    mutant(
        "a thread arrives for a block that has not",
        "primitives",
        "device.cuh",
        ("target_ += blocks_;\n    __syncthreads();", "target_ += blocks_;"),
    ),
    mutant(
        "a block leaves before the others have come",
        "primitives",
        "device.cuh",
        ("spin_pause();\n    }\n    __syncthreads();", "spin_pause();\n    }"),
    ),
    mutant("a barrier that works once", "primitives", "device.cuh", ("target_ += blocks_;", "target_ = blocks_;")),
    mutant(
        "a barrier that waits for one block too many",
        "primitives",
        "device.cuh",
        ("load_acquire(counter_) - target_) < 0", "load_acquire(counter_) - target_) <= 0"),
        says="deadlock",
    ),
    # Greedy MAP.
    mutant(
        "a pick's row that no barrier has made known",
        "dpp_select",
        "dpp_select.cuh",
        ("      barrier.sync();\n      return *slot++;", "      __syncthreads();\n      return *slot++;"),
    ),
    mutant(
        "quality left out of the gain",
        "dpp_select",
        "dpp_select.cuh",
        (
            "make_key(-(fabsf(item_quality[i]) * sqrtf(static_cast<float>(span_sqdist)))",
            "make_key(-sqrtf(static_cast<float>(span_sqdist))",
        ),
    ),
    mutant(
        "a Cholesky row without its last term",
        "dpp_select",
        "dpp_select.cuh",
        ("for (int64_t t = lane; t < step; t += 32)", "for (int64_t t = lane; t + 1 < step; t += 32)"),
    ),
    mutant(
        "a picked token may be picked again",
        "dpp_select",
        "dpp_select.cuh",
        ("if (lane == 0) item_state[i] = kPickedRow;", ""),
    ),
    mutant(
        "no check of dpp_select's num_tokens",
        "dpp_select",
        "dpp_select.cuh",
        ("if (count < 0 || count > tokens) count = 0;", "if (count < 0) count = 0;"),
        says=OVERRUN,
        nonsense=True,
    ),
    # Rounds.
    mutant(
        "no barrier before the ranks",
        "dedup_select",
        "dedup_select.cuh",
        ("      barrier.sync();\n      // (3) rank", "      // (3) rank"),
    ),
    mutant(
        "equal distances have one rank",
        "dedup_select",
        "dedup_select.cuh",
        ("closest[f] < distance || (closest[f] == distance && f < e)", "closest[f] < distance"),
    ),
    mutant(
        "one list for both halves of a round",
        "dedup_select",
        "dedup_select.cuh",
        ("*next = list + count;", "*next = list;"),
    ),
    mutant(
        "a listed token that is not there",
        "dedup_select",
        "unit_rows.cuh",
        ("rows.row(b, in_range ? token : 0)", "rows.row(b, token)"),
        says=OVERRUN,
        nonsense=True,
    ),
)


def apply(mutant: Mutant, sources: Path) -> None:
    """Makes the mutant in `sources`, a copy of csrc."""
    (path,) = sources.rglob(mutant.file)
    text = path.read_text()
    for old, new in mutant.edits:
        found = text.count(old)
        if found != 1:
            raise ValueError(f"mutant {mutant}: found {found} times instead of once in {mutant.file}: {old!r}")
        text = text.replace(old, new)
    path.write_text(text)


def verdict(mutant: Mutant, folder: Path) -> str:
    """How `mutant` is caught: WRONG or the program's output; "" if it survives. `folder` may serve many mutants."""
    sources = folder / "csrc"
    shutil.rmtree(sources, ignore_errors=True)
    shutil.copytree(build.CSRC, sources)
    apply(mutant, sources)
    name = f"{mutant.kernels}-{mutant.sanitizer or 'plain'}"
    options = (
        f"-DSTS_KERNELS_CSRC={sources}",
        f"-DSTS_KERNELS={mutant.kernels}.cuh",
        f"-DSTS_SANITIZE={mutant.sanitizer}",
        "-DSTS_EMULATED_MODULE=OFF",
    )
    program = build.build(folder / name, build.PROGRAM, options)
    for calls, order in product(mutant.rounds(), ORDERS):
        environment = {"STS_EMULATE_ORDER": order, **IMPATIENT}
        try:
            run_program([str(program)], calls, folder, timeout=60 if mutant.says == HANGS else 240, env=environment)
        except Failure as failure:
            return str(failure)
        except AssertionError:
            return WRONG
    return ""
