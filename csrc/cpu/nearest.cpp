// nearest on the CPU: for each query, the nearest allowed key; ties go to the lowest key.
//
// What: tiles of kQueries x kKeys dot products; each query keeps its best key in `Best`. A cosine is a dot product times both 1 / norm. A
//   squared distance in product form, |a|^2 + |b|^2 - 2 a.b, may cancel. So it only rules keys out: keys that its error bound leaves in
//   question are recomputed by differences, and only those distances are compared.
// Chosen when: the features are on the CPU.
// Steps:
//   (1) convert the rows to float32 and compute their norms (rows.h);
//   (2) compute the dot products of a tile;
//   (3) mask the keys that a query may not match;
//   (4) update the best key of each query.
// Synchronisation: a task is a range of query blocks, and writes the outputs of its queries alone.
#include "common/nearest_glue.h"

#include <tuple>

#include "rows.h"

namespace sts {
namespace {

// Running minimum of one query: the lowest value so far, and its lowest key.
struct Best {
  float value = kInfinity;
  int64_t index = -1;
  void offer(float v, int64_t i) {
    if (index < 0 || v < value || (v == value && i < index)) value = v, index = i;
  }
};

// Mask of a tile's keys: allowed[j] = whether query i may match key first + j. Returns whether any key is allowed.
struct Allowed {
  const NearestArguments& args;
  const cpu::FloatRows& keys;

  bool operator()(int64_t b, int64_t i, int64_t first, int64_t count, char* allowed) const {
    const char* usable = keys.usable.data() + b * keys.count + first;
    std::copy(usable, usable + count, allowed);
    if (args.query_rank) {
      const double* rank = args.key_ranks() + b * keys.count + first;
      const double limit = args.query_ranks()[b * args.query.size(1) + i];
      for (int64_t j = 0; j < count; ++j) allowed[j] = allowed[j] && rank[j] < limit;
    }
    if (args.exclude_self && i >= first && i < first + count) allowed[i - first] = false;
    return std::find(allowed, allowed + count, true) != allowed + count;
  }
};

// Squared distances. The product form |a|^2 + |b|^2 - 2 a.b with its error bound rules keys out; the others are recomputed by differences.
class Distances {
 public:
  Distances(const cpu::FloatRows& queries, const cpu::FloatRows& keys)
      : queries_(queries), keys_(keys), error_(2 * cpu::dot_error(keys.channels)), sqdist_(cpu::kKeys) {
    candidates_.reserve(cpu::kKeys);
    recheck_.reserve(cpu::kKeys);
  }

  // Updates `best` with the allowed keys of a tile. `first` and `first_key`: the first key's index in the item, and among all rows.
  void offer(int64_t query, int64_t first_key, int64_t first, int64_t count, const char* allowed, const float* dots, Best& best) {
    const float square = queries_.square[query];
    float max_square = 0.f, values[cpu::kKeys];
    const float* squares = keys_.square.data() + first_key;
    for (int64_t j = 0; j < count; ++j) {
      if (allowed[j]) max_square = std::max(max_square, squares[j]);
      values[j] = allowed[j] ? square + squares[j] - 2.f * dots[j] : kInfinity;
    }
    const float error = error_ * (square + max_square);
    const bool bounded = cpu::in_range(square) && cpu::in_range(max_square);  // false: the error bound does not hold, recompute all keys
    if (bounded && best.index < 0) {                                          // no best yet: the nearest by product form is a first bound
      const int64_t nearest = cpu::lowest(values, count).index;
      recompute(query, first_key, &nearest, 1, first, best);
    }
    recheck_.clear();
    for (int64_t j = 0; j < count; ++j)
      if (allowed[j] && (!bounded || !(values[j] - error > best.value))) recheck_.push_back(j);
    recompute(query, first_key, recheck_.data(), static_cast<int64_t>(recheck_.size()), first, best);
  }

 private:
  // Updates `best` with the distances, by differences, of the given keys of the tile.
  void recompute(int64_t query, int64_t first_key, const int64_t* tile_keys, int64_t count, int64_t first, Best& best) {
    candidates_.clear();
    for (int64_t c = 0; c < count; ++c) candidates_.push_back(keys_.row[first_key + tile_keys[c]]);
    cpu::sqdist(&queries_.row[query], 1, candidates_.data(), count, candidates_.data(), 0, keys_.channels, sqdist_.data(), count);
    for (int64_t c = 0; c < count; ++c) best.offer(sqdist_[c], first + tile_keys[c]);
  }

  const cpu::FloatRows &queries_, &keys_;
  const float error_;
  std::vector<float> sqdist_;
  std::vector<const float*> candidates_;
  std::vector<int64_t> recheck_;  // keys of the tile to recompute
};

void match(cpu::WorkerTeam& team, const NearestArguments& args, const cpu::FloatRows& queries, const cpu::FloatRows& keys, int64_t* index,
           float* value) {
  const int64_t blocks = ceil_div(queries.count, cpu::kQueries);
  const Allowed may_match{args, keys};
  team.for_rows(queries.batch * blocks, 2 * cpu::kQueries * keys.count * keys.channels, [&](int64_t begin, int64_t end) {
    Distances distances(queries, keys);
    float dots[cpu::kPoints * cpu::kKeys];
    char allowed[cpu::kKeys];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t b = block / blocks, i0 = block % blocks * cpu::kQueries, i1 = std::min(i0 + cpu::kQueries, queries.count);
      const int64_t present = counted(data_or_null(args.num_keys), b, keys.count);
      Best best[cpu::kQueries];
      for (int64_t first = 0; first < present; first += cpu::kKeys) {
        const int64_t count = std::min<int64_t>(cpu::kKeys, present - first), first_key = b * keys.count + first;
        for (int64_t i = i0; i < i1; i += cpu::kPoints) {
          const int64_t used = std::min<int64_t>(cpu::kPoints, i1 - i), query = b * queries.count + i;
          // (2) dot products
          cpu::dot(&queries.row[query], static_cast<int>(used), &keys.row[first_key], count, keys.channels, dots, cpu::kKeys);
          for (int64_t p = 0; p < used; ++p) {
            Best& query_best = best[i + p - i0];
            // (3) mask
            if (!queries.usable[query + p] || !may_match(b, i + p, first, count, allowed)) continue;
            // (4) update the best
            const float* dot = dots + p * cpu::kKeys;
            if (!args.cosine) {
              distances.offer(query + p, first_key, first, count, allowed, dot, query_best);
              continue;
            }
            // Cosines are negated, so that the nearest is the lowest, and clamped to [-1, 1].
            float values[cpu::kKeys];
            const float per_query = -queries.square[query + p];
            for (int64_t j = 0; j < count; ++j) {
              const float negated = dot[j] * per_query * keys.square[first_key + j];
              values[j] = allowed[j] ? std::min(std::max(negated, -1.f), 1.f) : kInfinity;
            }
            const cpu::Lowest lowest = cpu::lowest(values, count);
            query_best.offer(lowest.value, first + lowest.index);
          }
        }
      }
      for (int64_t i = i0; i < i1; ++i) {
        const Best& query_best = best[i - i0];
        index[b * queries.count + i] = query_best.index;
        value[b * queries.count + i] = args.cosine ? 0.f - query_best.value : query_best.value;
      }
    }
  });
}

std::tuple<Tensor, Tensor> nearest_cpu(const Tensor& query, const Tensor& key, std::string metric, std::optional<Tensor> query_rank,
                                       std::optional<Tensor> key_rank, bool exclude_self, std::optional<Tensor> num_keys) {
  const NearestArguments args(query, key, metric, query_rank, key_rank, exclude_self, num_keys);
  const int64_t batch = args.query.size(0), rows = args.query.size(1), count = args.key.size(1), channels = args.key.size(2);
  args.check_values(data_or_null(args.num_keys));
  Tensor index = new_indices(args.query, {batch, rows}), value = new_floats(args.query, {batch, rows});
  cpu::dispatch(args.query.scalar_type(), [&](auto* element) {
    using scalar_t = std::remove_pointer_t<decltype(element)>;
    cpu::with_team(2 * batch * rows * count * channels, [&](cpu::WorkerTeam& team) {
      // (1) float32 rows
      const auto keys = cpu::FloatRows::of(team, rows_of<scalar_t>(args.key), batch, count, args.cosine);
      const auto queries = cpu::FloatRows::of(team, rows_of<scalar_t>(args.query), batch, rows, args.cosine);
      match(team, args, queries, keys, static_cast<int64_t*>(index.mutable_data_ptr()), static_cast<float*>(value.mutable_data_ptr()));
    });
  });
  return {index, value};
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CPU, m) { m.impl("nearest", TORCH_BOX(&sts::nearest_cpu)); }
