// A selection with everything fixed that the plan chooses by size.
#pragma once
#include "cuda/selection.cuh"

namespace sts {

// A selection as the ops run it. notes, if not null, is given what is noted on the way: where blocks share an item the least
// weights, else of stored weights on tensor cores the marks (SelectionScratch), of sweeps how often the blocks of the first group have
// come to a barrier. Items of at most matrix_tokens tokens go through stored weights, shared by item_blocks blocks each (0: as planned);
// packed ones in waves of wave_floats (0: as planned). wgmma: where the device has it. Every part of the scratch is
// an allocation of its own, filled with NaN.
template <class scalar_t, class Rule>
cudaError_t run_selection(const Rows<scalar_t>& rows, const Items& items, int64_t matrix_tokens, int item_blocks, int lookahead, bool wgmma,
                          int64_t wave_floats, Rule rule, unsigned* notes, int64_t* out, cudaStream_t stream) {
  SelectionPlan plan =
      plan_selection<scalar_t, Rule>(rows, items, matrix_tokens, lookahead, wgmma, wave_floats ? wave_floats : kWaveFloats);
  if (plan.stored && item_blocks) plan.item_blocks = item_blocks;
  void* parts[20];
  int count = 0;
  const SelectionScratch scratch(plan, items, rows.channels, [&](int64_t bytes) -> void* {
    parts[count] = nullptr;
    if (cudaMalloc(&parts[count], bytes) != cudaSuccess || cudaMemsetAsync(parts[count], 0xff, bytes, stream) != cudaSuccess)
      return nullptr;
    return parts[count++];
  });
  cudaError_t error = launch_selection(rows, items, plan, scratch, rule, out, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  const unsigned* noted = scratch.row_min ? scratch.row_min : scratch.marks ? scratch.marks : scratch.arrived;
  const int64_t num_noted = scratch.row_min ? all_tokens(items) : scratch.marks ? SelectionScratch::marks_of(plan, items) : 1;
  if (error == cudaSuccess && notes && noted) error = cudaMemcpy(notes, noted, num_noted * sizeof *notes, cudaMemcpyDeviceToDevice);
  while (count) cudaFree(parts[--count]);
  return error;
}

// The same on unit rows.
template <class scalar_t, class Rule>
cudaError_t run_unit_selection(const Rows<scalar_t>& rows, const Items& items, int64_t matrix_tokens, int item_blocks, int lookahead,
                               int64_t wave_floats, Rule rule, int64_t* out, cudaStream_t stream) {
  const int64_t entries = items.packed() ? 1 : items.count, floats = entries * items.tokens * unit_pitch(rows.channels);
  void* unit = nullptr;
  cudaError_t error = cudaMalloc(&unit, floats * sizeof(float));
  if (error == cudaSuccess) error = cudaMemsetAsync(unit, 0xff, floats * sizeof(float), stream);
  if (error == cudaSuccess)
    error = launch_unit_rows(rows, entries, items.tokens, items.tokens, nullptr, static_cast<float*>(unit), nullptr, stream);
  const Rows<float> unit_rows = unit_rows_of(static_cast<const float*>(unit), items.tokens, rows.channels);
  if (error == cudaSuccess)
    error = run_selection(unit_rows, items, matrix_tokens, item_blocks, lookahead, true, wave_floats, UnitRows<Rule>{rule}, nullptr, out,
                          stream);
  cudaFree(unit);
  return error;
}

}  // namespace sts
