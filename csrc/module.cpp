// fused_losses._C: importing it registers the ops; its functions answer questions about the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "torch/kept_memory.h"

#ifndef FUSED_LOSSES_CUDA_ARCHS
#define FUSED_LOSSES_CUDA_ARCHS ""
#endif

namespace py = pybind11;
using namespace fused_losses;

static std::vector<std::string> cuda_architectures() {
  std::vector<std::string> found;
  std::stringstream list(FUSED_LOSSES_CUDA_ARCHS);
  for (std::string one; std::getline(list, one, ';');)
    if (!one.empty()) found.push_back(one);
  return found;
}

// x and y: contiguous buffers of float32 or float64, of one length
static void evaluate(const std::string& function, const py::buffer& x, const py::buffer& y, double parameter) {
  const py::buffer_info from = x.request(), to = y.request(true);
  const bool f64 = from.format == py::format_descriptor<double>::format();
  if ((!f64 && from.format != py::format_descriptor<float>::format()) || from.format != to.format ||
      from.size != to.size)
    throw std::invalid_argument("evaluate() takes two float32 or two float64 buffers of one length");
  if (!cpu::kernels().evaluate(function.c_str(), from.ptr, to.ptr, from.size, f64 ? DType::f64 : DType::f32, parameter))
    throw std::invalid_argument("evaluate() knows no function '" + function + "'");
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of fused_losses.";
  m.def("cpu_level", [] { return cpu::kernels().name; }, "The instruction-set level in use.");
  m.def(
      "cpu_levels",
      [] {
        std::vector<std::string> names;
        for (const cpu::Kernels* level : cpu::runnable()) names.emplace_back(level->name);
        return names;
      },
      "The levels this CPU runs, slowest first.");
  m.def("cuda_architectures", &cuda_architectures, "What the CUDA part was compiled for; empty if it was left out.");
  m.def("torch_version", [] { return FUSED_LOSSES_TORCH; }, "The PyTorch it was compiled with.");
  m.def("evaluate", &evaluate, py::arg("function"), py::arg("x"), py::arg("y"), py::arg("parameter") = 0.0,
        "y[i] = function(x[i]) by the vector functions of the level in use: exp, log, log1p, log1p_unit, odds, sqrt, "
        "pow.");
  m.def("release_kept_memory", &release_kept_memory, "Gives the memory kept for gradients back to the system.");
  cpu::kernels();  // a wrong FUSED_LOSSES_CPU_LEVEL is an error here, not at the first loss
}
