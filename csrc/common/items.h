// The items of a selection: where each one's tokens are, how many it keeps and where its picks go. One description serves
// padded batches (B, N, C) and packed ones (T, C), on the CPU and on the GPU.
#pragma once
#include <cstdint>

#include "selection_rule.h"

namespace sts {

STS_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Item {
  int64_t first;   // its first token, within the batch entry `row_of` reads
  int64_t tokens;  // 0: nothing to pick, or its numbers make no sense (see `valid`)
  int64_t picks;   // places in the output; those past `tokens` hold -1
  int64_t out;     // its first place in the output
  int64_t anchor;  // first pick, or -1: the rule's own
  bool valid;      // false: counts, offsets or the anchor are out of range, and every pick is -1
};

// A vector of integers of either type, or null.
struct Integers {
  const void* data;
  bool narrow;  // int32, else int64

  STS_HOST_DEVICE Integers(const int64_t* wide = nullptr) : data(wide), narrow(false) {}
  STS_HOST_DEVICE Integers(const void* data, bool narrow) : data(data), narrow(narrow) {}
  STS_HOST_DEVICE int64_t operator[](int64_t i) const {
    return narrow ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
  }
};

struct Items {
  int64_t count;              // B
  int64_t tokens;             // N padded, T packed
  int64_t picks;              // k of each item padded, total_k packed
  const int64_t* num_tokens;  // padded, may be null
  Integers cu_seqlens;        // packed, null when padded
  Integers cu_budgets;
  const int64_t* anchor;             // may be null
  const float* start = nullptr;      // of every token (B, N) or (T), may be null; see selection_rule.h
  const float* parameter = nullptr;  // likewise
  int64_t max_seqlen = INT64_MAX;    // packed: an item of more tokens is not valid
  const Item* planned = nullptr;     // packed, on a GPU: all items, once they are looked through (packed_plan.cuh)

  STS_HOST_DEVICE bool packed() const { return cu_seqlens.data != nullptr; }
  // Tokens of the longest item, as far as shapes say.
  STS_HOST_DEVICE int64_t longest() const { return packed() && max_seqlen < tokens ? max_seqlen : tokens; }

  // Index of an item's first token among all tokens: in `start`, `parameter` and scratch of one number for each token.
  STS_HOST_DEVICE int64_t first_token(int64_t b, const Item& item) const { return (packed() ? 0 : b * tokens) + item.first; }
  STS_HOST_DEVICE float parameter_of(int64_t token) const { return parameter ? parameter[token] : 1.f; }
  // The potential of a finite token before the first pick.
  template <class Rule>
  STS_HOST_DEVICE float start_of(const Rule& rule, int64_t token) const {
    return rule.start(start ? start[token] : kNonFinitePotential, parameter_of(token));
  }
  // Its key for the first pick where there is no anchor and no mean (Rule::kFromMean): the smallest, the lowest index among equals.
  // Where no start is given all potentials are alike, and the quality decides.
  template <class Rule>
  STS_HOST_DEVICE float first_key_of(const Rule& rule, int64_t token) const {
    return rule.start(start ? start[token] : 1.f, parameter_of(token));
  }

  // Never out of bounds, whatever the arrays hold.
  STS_HOST_DEVICE Item operator[](int64_t b) const {
    if (planned) return planned[b];
    Item item{0, tokens, picks, b * picks, -1, true};
    if (packed()) {
      const int64_t end = cu_seqlens[b + 1], out_end = cu_budgets[b + 1];
      item.first = cu_seqlens[b];
      item.out = cu_budgets[b];
      // Compared before they are subtracted: the difference of two arbitrary numbers may wrap around to a good one.
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

// Rows of features: token i of batch entry b. Packed features are one entry.
template <class scalar_t>
struct Rows {
  const scalar_t* data;
  int64_t batch_stride, row_stride;  // in elements; channels are contiguous
  int channels;
  STS_HOST_DEVICE const scalar_t* row(int64_t b, int64_t i) const { return data + b * batch_stride + i * row_stride; }
};

}  // namespace sts
