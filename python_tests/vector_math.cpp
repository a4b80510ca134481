// Test of the SIMD loops of the CPU kernels against plain loops. test_cpu_parts.py compiles it for each vector width. Prints failures.
#include "cpu/vector_math.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

using namespace sts::cpu;

int failures = 0;

void check(bool good, const char* what, int64_t channels) {
  if (!good && ++failures <= 20) std::printf("%s, %d channels\n", what, static_cast<int>(channels));
}

template <class scalar_t>
void check_rows(int64_t channels) {
  constexpr int kRows = 19;
  std::mt19937 random(static_cast<unsigned>(channels));
  std::normal_distribution<float> normal;
  std::vector<scalar_t> data(kRows * channels);
  for (scalar_t& x : data) x = static_cast<scalar_t>(normal(random));
  if (channels > 2) data[1] = static_cast<scalar_t>(-1e-6f);  // subnormal in float16
  // Each row has its own allocation, so that a sanitizer sees reads past its end.
  std::vector<std::vector<scalar_t>> own;
  std::vector<const scalar_t*> row;
  for (int r = 0; r < kRows; ++r) own.emplace_back(data.begin() + r * channels, data.begin() + (r + 1) * channels);
  for (const auto& r : own) row.push_back(r.data());
  std::vector<std::vector<float>> point(kRows, std::vector<float>(point_size(channels), 7.f));
  std::vector<const float*> points;
  for (int p = 0; p < kRows; ++p) {
    to_point(row[p], point[p].data(), channels);
    points.push_back(point[p].data());
    float sum = 0.f, want = 0.f;
    for (float x : point[p]) sum += std::fabs(x);
    for (scalar_t x : own[p]) want += std::fabs(static_cast<float>(x));
    check(std::fabs(sum - want) <= 1e-5f * want, "to_point loses or invents channels", channels);
  }
  std::vector<float> one(kRows * kRows), several(kRows * kRows);
  for (int p = 0; p < kRows; ++p)
    for (int r = 0; r < kRows; ++r) {
      sqdist(&points[p], 1, &row[r], 1, &row[r] + 1, kRows - 1 - r, channels, &one[p * kRows + r], kRows);
      double want = 0;
      for (int64_t c = 0; c < channels; ++c) {
        const double difference = double(static_cast<float>(own[p][c])) - double(static_cast<float>(own[r][c]));
        want += difference * difference;
      }
      check(std::fabs(one[p * kRows + r] - want) <= 1e-5 * want, "sqdist is wrong", channels);
    }
  for (int p = 0; p < kRows; ++p)
    for (int r = 0; r < p; ++r) check(one[p * kRows + r] == one[r * kRows + p], "sqdist is not symmetric", channels);
  for (int num_points : {2, 4, 5, 8, 12, 16, kRows})
    for (int num_rows : {1, 2, 3, 4, 7, 8, kRows}) {
      sqdist(points.data(), num_points, row.data(), num_rows, row.data() + num_rows, kRows - num_rows, channels, several.data(), kRows);
      for (int p = 0; p < num_points; ++p)
        check(!std::memcmp(&several[p * kRows], &one[p * kRows], num_rows * sizeof(float)), "a tile has other bits than a pair", channels);
    }

  std::vector<float> sum(point_size(channels));
  for (int r = 0; r < 3; ++r) add_row(row[r], sum.data(), channels);
  for (int64_t c = 0; c < point_size(channels); ++c)
    check(sum[c] == point[0][c] + point[1][c] + point[2][c], "add_row adds something else", channels);
  std::vector<double> weighted(channels, 1.0);
  add_weighted(row[0], 0.25, weighted.data(), channels);
  for (int64_t c = 0; c < channels; ++c)
    check(weighted[c] == 1 + 0.25 * double(static_cast<float>(own[0][c])), "add_weighted adds something else", channels);
  if constexpr (std::is_same_v<scalar_t, float>) {
    for (int p = 0; p < kRows; ++p)
      for (int r = 0; r < kRows; ++r) {
        dot(&points[p], 1, &row[r], 1, channels, &one[p * kRows + r], kRows);
        double want = 0, size = 0;
        for (int64_t c = 0; c < channels; ++c) want += double(own[p][c]) * own[r][c], size += std::fabs(double(own[p][c]) * own[r][c]);
        check(std::fabs(one[p * kRows + r] - want) <= 1e-6 * size, "dot is wrong", channels);
      }
    dot(points.data(), kRows, row.data(), kRows, channels, several.data(), kRows);
    check(several == one, "a tile of products has other bits than a pair", channels);
  }
  check(all_finite(row[0], channels), "a finite row is not", channels);
  for (float non_finite : {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(), std::nanf("")})
    for (int64_t c : {int64_t(0), channels / 2, channels - 1}) {
      std::vector<scalar_t> bad = own[0];
      bad[c] = static_cast<scalar_t>(non_finite);
      check(!all_finite(bad.data(), channels), "a row that is not finite is", channels);
    }
}

void check_values(int64_t count) {
  std::mt19937 random(static_cast<unsigned>(count));
  std::vector<float> values(count), addend(count), sums(count);
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(random() % 4), addend[i] = static_cast<float>(random() % 4);
  if (count > 5) values[5] = std::numeric_limits<float>::infinity();
  const auto agrees = [&](Lowest got, const std::vector<float>& in) {
    int64_t want = 0;
    for (int64_t i = 1; i < count; ++i)
      if (in[i] < in[want]) want = i;
    return got.index == want && got.value == in[want];
  };
  check(agrees(lowest(values.data(), count), values), "lowest is not", count);
  const sts::Repulsion repulsion{0.5f};
  const sts::Farthest farthest;
  const sts::UnitRows<sts::Farthest> unit_rows;
  std::vector<float> larger = values;
  for (int64_t i = 0; i < count; ++i) sums[i] = values[i] + addend[i], larger[i] = std::fmax(values[i], addend[i]);
  std::vector<float> added = values;
  check(agrees(add_then_lowest(repulsion, added.data(), addend.data(), count), sums) && added == sums, "a sum is wrong", count);
  added = values;
  check(agrees(add_then_lowest(farthest, added.data(), addend.data(), count), larger) && added == larger, "a maximum is wrong", count);
  if (count > 1) values[1] = std::nanf("");
  if (count > 2) values[2] = 9.f;  // above 4, the largest squared distance of unit rows
  const auto weighs = [&](const auto& rule, const float* parameters, const auto& want, const char* what) {
    std::vector<float> weight = values;
    to_weight(rule, weight.data(), parameters, count, 1.f);
    for (int64_t i = 0; i < count; ++i) {
      const float w = want(values[i], parameters ? parameters[i] : 1.f);
      check(weight[i] == w && std::signbit(weight[i]) == std::signbit(w), what, count);
    }
  };
  constexpr float kMaxFloat = std::numeric_limits<float>::max();
  const auto negative = [](float value) { return value > 0.f ? -value : 0.f; };
  const auto far = [&](float d, float q) { return negative((d < kMaxFloat ? d : kMaxFloat) * q); };
  weighs(repulsion, nullptr, [](float d, float) { return std::isnan(d) ? 0.f : 1.f / (d + 0.5f); }, "a repulsion is wrong");
  for (const float* parameters : {static_cast<const float*>(nullptr), static_cast<const float*>(addend.data())}) {
    weighs(farthest, parameters, far, "a quality times distance is wrong");
    weighs(unit_rows, parameters, [&](float d, float q) { return far(d > 5.f ? 2.f : d, q); }, "a zero row's weight is wrong");
  }
}

void check_unit(int64_t channels) {
  std::mt19937 random(static_cast<unsigned>(channels));
  std::normal_distribution<float> normal;
  const int64_t size = point_size(channels);
  std::vector<float> row(channels), unit(size), other(size);
  for (float& x : row) x = normal(random);
  for (int exponent : {0, 100, -100, -120}) {
    double square = 0;
    for (float x : row) square += double(x) * double(x);
    to_point(row.data(), unit.data(), channels);
    for (float& x : unit) x = std::ldexp(x, exponent);
    check(to_unit(unit.data(), size), "a row has no length", channels);
    if (exponent == 0) other = unit;
    check(exponent == -120 || unit == other, "rows that differ by a power of two have other units", channels);
    for (int64_t c = 0; c < channels; ++c) check(std::fabs(unit[c] - row[c] / std::sqrt(square)) <= 2e-6, "to_unit is wrong", channels);
  }
  std::vector<float> zero(size);
  check(!to_unit(zero.data(), size) && zero == std::vector<float>(size), "a zero row has a length", channels);
  for (float non_finite : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
    unit[channels / 2] = non_finite;
    check(to_unit(unit.data(), size) && std::isnan(unit[0]), "a row that is not finite has a unit", channels);
  }
}

// The float64 loops of dpp_select. The bits of a pair or an element must be the same in tiles of every size.
void check_sums(int64_t size) {
  constexpr int kRows = 9;
  std::mt19937 random(static_cast<unsigned>(size));
  std::normal_distribution<double> normal;
  std::vector<std::vector<float>> row(kRows, std::vector<float>(size));
  std::vector<std::vector<double>> point(kRows, std::vector<double>(size)), left(kRows, std::vector<double>(size));
  std::vector<const float*> rows;
  std::vector<const double*> points;
  for (int p = 0; p < kRows; ++p) {
    for (int64_t c = 0; c < size; ++c) point[p][c] = row[p][c] = static_cast<float>(normal(random)), left[p][c] = normal(random);
    rows.push_back(row[p].data());
    points.push_back(point[p].data());
  }
  std::vector<double> one(kRows * kRows), several(kRows * kRows);
  for (int p = 0; p < kRows; ++p)
    for (int r = 0; r < kRows; ++r) {
      dot64(&points[p], 1, &rows[r], 1, size, &one[p * kRows + r], kRows);
      double want = 0;
      for (int64_t c = 0; c < size; ++c) want += point[p][c] * row[r][c];
      check(std::fabs(one[p * kRows + r] - want) <= 1e-13 * size, "dot64 is wrong", size);
    }
  for (int num_points : {2, 4, 5, kRows})
    for (int num_rows : {1, 3, 4, 5, kRows}) {
      dot64(points.data(), num_points, rows.data(), num_rows, size, several.data(), kRows);
      for (int p = 0; p < num_points; ++p)
        check(!std::memcmp(&several[p * kRows], &one[p * kRows], num_rows * sizeof(double)), "a tile has other bits than a pair", size);
    }

  if (size % kColumns == 0) {
    const int64_t terms = 5, middle = size / (2 * kColumns) * kColumns;
    std::vector<double> term(terms * size);
    for (double& x : term) x = normal(random);
    std::vector<std::vector<double>> alone = left, together = left;
    std::vector<double*> tile;
    for (int p = 0; p < kRows; ++p) {
      double* own = alone[p].data();
      subtract_products(&own, &points[p], 1, term.data(), size, terms, 0, size);
      tile.push_back(together[p].data());
      for (int64_t i = 0; i < size; ++i) {
        double want = left[p][i];
        for (int64_t t = 0; t < terms; ++t) want -= point[p][t] * term[t * size + i];
        check(std::fabs(alone[p][i] - want) <= 1e-12, "subtract_products is wrong", size);
      }
    }
    subtract_products(tile.data(), points.data(), kRows, term.data(), size, terms, 0, middle);
    subtract_products(tile.data(), points.data(), kRows, term.data(), size, terms, middle, size);
    check(alone == together, "subtract_products has other bits in a tile", size);

    std::vector<double> entry = left[0], distance(size, 1.);
    std::vector<float> weight(size, 0.5f), loss(size);
    distance[3] = entry[3] * entry[3] / 4 + 1e-11;  // below kInSpan after finish_row
    const Lowest best = finish_row(entry.data(), 2., distance.data(), weight.data(), loss.data(), size);
    int64_t want = 0;
    for (int64_t i = 0; i < size; ++i) {
      check(entry[i] == left[0][i] / 2, "finish_row divides wrongly", size);
      check(loss[i] == static_cast<float>(-0.5 * distance[i]), "finish_row has another loss", size);
      if (loss[i] < loss[want]) want = i;
    }
    check(distance[3] == 0 && best.index == want && best.value == loss[want], "finish_row is wrong", size);
  }

  for (int64_t count : {size, size - 1, size - 31}) {
    float lowest = std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < count; ++i) lowest = std::min(lowest, row[0][i] + row[1][i]);
    check(lowest_sum(row[0].data(), row[1].data(), count) == lowest, "lowest_sum is not", count);
  }
}

int main() {
  for (int64_t size : {32, 64, 96, 1056}) check_sums(size);
  for (int64_t n = 1; n <= 70; ++n) {
    check_rows<float>(n);
    check_rows<Half>(n);
    check_rows<BFloat16>(n);
    check_values(n);
    check_unit(n);
  }
  check_rows<float>(1027);
  check_rows<Half>(1027);
  check_rows<BFloat16>(1027);
  return failures != 0;
}
