// A selection whose plan tests can override.
#pragma once
#include "cuda/selection.cuh"
#include "kernel_table.h"

namespace sts {

// A selection as the ops run it.
//   matrix_tokens: items of at most so many tokens have stored weights
//   item_blocks: blocks that share such an item, however short; 0: as planned
//   wave_floats: floats of weights in a wave of packed items; 0: as planned
//   wgmma: used if the device has it
//   debug_out, if not null: the row minima if the scratch has them, else the marks if it has them (SelectionScratch), else the barrier
//     arrivals of the first group of sweeping blocks
template <class scalar_t, class Rule>
cudaError_t run_selection(const Rows<scalar_t>& rows, const Items& items, int64_t matrix_tokens, int item_blocks, int lookahead, bool wgmma,
                          int64_t wave_floats, Rule rule, unsigned* debug_out, int64_t* out, cudaStream_t stream) {
  SelectionPlan plan =
      plan_selection<scalar_t, Rule>(rows, items, matrix_tokens, lookahead, wgmma, wave_floats ? wave_floats : kWaveFloats);
  if (plan.stored && item_blocks) plan.item_blocks = item_blocks, plan.cluster_from = 0;
  const auto layout = [&](auto&& allocate) { return SelectionScratch(plan, items, rows.channels, allocate); };
  kernel_table::Scratch memory(stream, layout);
  const SelectionScratch scratch = layout(memory);
  cudaError_t error = launch_selection(rows, items, plan, scratch, rule, out, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  const unsigned* debug_data = scratch.stats.row_min ? scratch.stats.row_min : scratch.marks ? scratch.marks : scratch.arrived;
  const int64_t debug_count = scratch.stats.row_min ? all_tokens(items) : scratch.marks ? SelectionScratch::marks_of(plan, items) : 1;
  if (error == cudaSuccess && debug_out && debug_data)
    error = cudaMemcpy(debug_out, debug_data, debug_count * sizeof *debug_out, cudaMemcpyDeviceToDevice);
  return error;
}

// The same over unit rows.
template <class scalar_t, class Rule>
cudaError_t run_unit_selection(const Rows<scalar_t>& rows, const Items& items, int64_t matrix_tokens, int item_blocks, int lookahead,
                               int64_t wave_floats, Rule rule, int64_t* out, cudaStream_t stream) {
  const int64_t entries = items.entries();
  const auto layout = [&](auto&& allocate) {
    float* unit;
    take_array(unit, entries * items.tokens * unit_pitch(rows.channels), allocate);
    return unit;
  };
  kernel_table::Scratch memory(stream, layout);
  float* const unit = layout(memory);
  const cudaError_t error = launch_unit_rows(rows, entries, items.tokens, items.tokens, nullptr, unit, nullptr, stream);
  if (error != cudaSuccess) return error;
  return run_selection(unit_rows_of(unit, items.tokens, rows.channels), items, matrix_tokens, item_blocks, lookahead, true, wave_floats,
                       UnitRows<Rule>{rule}, nullptr, out, stream);
}

}  // namespace sts
