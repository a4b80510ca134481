// The items of a selection: the tokens of each item, its number of picks and its place in the output. One description serves
// padded batches (B, N, C) and packed batches (T, C), on the CPU and on the GPU.
#pragma once
#include <cstdint>

#include "selection_rule.h"

namespace sts {

STS_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Item {
  int64_t first;   // row of the first token; padded: 0, in batch entry b; packed: cu_seqlens[b], in the single entry
  int64_t tokens;  // 0 if the item is empty or not valid
  int64_t picks;   // output slots; slots past `tokens` hold -1
  int64_t out;     // index of the first output slot
  int64_t anchor;  // first pick, counted from `first`; -1: the rule chooses it
  bool valid;      // false: a count, offset or anchor is out of range, and every pick is -1
};

// An int32 or int64 vector, or null.
struct Integers {
  const void* data;
  bool narrow;  // true: int32; false: int64

  STS_HOST_DEVICE Integers(const int64_t* wide = nullptr) : data(wide), narrow(false) {}
  STS_HOST_DEVICE Integers(const void* data, bool narrow) : data(data), narrow(narrow) {}
  STS_HOST_DEVICE int64_t operator[](int64_t i) const {
    return narrow ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
  }
};

struct Items {
  int64_t count;                     // B
  int64_t tokens;                    // padded: N; packed: T
  int64_t picks;                     // padded: k, per item; packed: total_k
  const int64_t* num_tokens;         // (B), padded only, may be null
  Integers cu_seqlens;               // (B + 1), packed; null if padded
  Integers cu_budgets;               // (B + 1), packed; null if padded
  const int64_t* anchor;             // (B), may be null
  const float* start = nullptr;      // (B, N) or (T), may be null; see selection_rule.h
  const float* parameter = nullptr;  // (B, N) or (T), may be null; see selection_rule.h
  int64_t max_seqlen = INT64_MAX;    // packed: a longer item is not valid
  const Item* planned = nullptr;     // (B), packed on a GPU: the items as packed_plan.cuh checked them; null before

  STS_HOST_DEVICE bool packed() const { return cu_seqlens.data != nullptr; }
  // Upper bound of the tokens of an item, from shapes and max_seqlen alone.
  STS_HOST_DEVICE int64_t longest() const { return packed() && max_seqlen < tokens ? max_seqlen : tokens; }

  // Batch entries of the features, and that of item b: packed items share one.
  STS_HOST_DEVICE int64_t entries() const { return packed() ? 1 : count; }
  STS_HOST_DEVICE int64_t entry(int64_t b) const { return packed() ? 0 : b; }

  // Index of an item's first token in arrays of one number per token: `start`, `parameter`, scratch.
  STS_HOST_DEVICE int64_t first_token(int64_t b, const Item& item) const { return (packed() ? 0 : b * tokens) + item.first; }
  STS_HOST_DEVICE float parameter_of(int64_t token) const { return parameter ? parameter[token] : 1.f; }
  STS_HOST_DEVICE float start_of(int64_t token) const { return start ? start[token] : kNonFinitePotential; }

  // Item b. Invariant: its ranges are in bounds, whatever numbers the arrays hold.
  STS_HOST_DEVICE Item operator[](int64_t b) const {
    if (planned) return planned[b];
    Item item{0, tokens, picks, b * picks, -1, true};
    if (packed()) {
      const int64_t end = cu_seqlens[b + 1], out_end = cu_budgets[b + 1];
      item.first = cu_seqlens[b];
      item.out = cu_budgets[b];
      // Compare before subtracting: the difference of two arbitrary numbers may wrap around to a valid one.
      if (item.out < 0 || out_end < item.out || out_end > picks)
        item.out = 0, item.picks = 0;
      else
        item.picks = out_end - item.out;
      item.valid = item.first >= 0 && item.first <= end && end <= tokens && end - item.first <= max_seqlen;
      item.tokens = item.valid ? end - item.first : 0;
    } else if (num_tokens) {
      item.tokens = num_tokens[b];
      item.valid = item.tokens >= 0 && item.tokens <= tokens;
    }
    if (item.valid && anchor && item.tokens > 0 && item.picks > 0) {
      item.anchor = anchor[b];
      item.valid = item.anchor >= 0 && item.anchor < item.tokens;
    }
    if (!item.valid) item.first = item.tokens = 0;
    return item;
  }
};

// Tokens of entry b of a padded batch (B, tokens): counts[b], or 0 if that is out of range. counts: (B); null: all.
STS_HOST_DEVICE int64_t counted(const int64_t* counts, int64_t b, int64_t tokens) {
  if (!counts) return tokens;
  const int64_t count = counts[b];
  return count >= 0 && count <= tokens ? count : 0;
}

// A padded batch of which nothing is selected. num_tokens: (batch), may be null.
inline Items padded_items(int64_t batch, int64_t tokens, const int64_t* num_tokens = nullptr) {
  return {batch, tokens, 0, num_tokens, nullptr, nullptr, nullptr};
}

// Rows of features: row(b, i) is token i of batch entry b. Packed features are a single entry, with b = 0.
template <class scalar_t>
struct Rows {
  const scalar_t* data;
  int64_t batch_stride, row_stride;  // in elements; channels are contiguous
  int channels;
  STS_HOST_DEVICE const scalar_t* row(int64_t b, int64_t i) const { return data + b * batch_stride + i * row_stride; }
};

}  // namespace sts
