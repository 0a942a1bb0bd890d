// The Python face of the C++ library: checks arrays, releases the GIL, calls. No logic.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "iqmpc/isa.hpp"
#include "iqmpc/normed_linear.hpp"

namespace py = pybind11;

namespace {

// One side of an expected shape: a size, or a name where any size will do.
struct Side {
  // Implicit, so that a braced list reads as a shape: {"N", 134}.
  Side(const char* label) : name(label) {}
  Side(py::ssize_t length) : name(std::to_string(length)), size(length) {}

  std::string name;
  py::ssize_t size = -1;
};

std::string join(const std::vector<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : ", ") + part;
  return "[" + text + "]";
}

// `object` as a C-contiguous float32 array of the expected shape, or an error that says what it is.
py::array checked(const py::object& object, const char* name, const std::vector<Side>& shape) {
  if (!py::isinstance<py::array>(object)) {
    throw py::type_error(std::string(name) + " must be a NumPy array, got " +
                         std::string(py::str(py::type::of(object).attr("__name__"))));
  }
  const auto array = py::reinterpret_borrow<py::array>(object);
  bool fits = py::isinstance<py::array_t<float>>(array) &&
              array.ndim() == static_cast<py::ssize_t>(shape.size());
  for (std::size_t d = 0; fits && d < shape.size(); ++d) {
    const auto size = array.shape(static_cast<py::ssize_t>(d));
    fits = shape[d].size < 0 || shape[d].size == size;
  }
  if (!fits) {
    std::vector<std::string> expected, got;
    for (const Side& side : shape) expected.push_back(side.name);
    for (py::ssize_t d = 0; d < array.ndim(); ++d) got.push_back(std::to_string(array.shape(d)));
    throw py::value_error(std::string(name) + " must be float32 with shape " + join(expected) +
                          ", got " + std::string(py::str(array.dtype())) + " " + join(got));
  }
  constexpr int kLayout = py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ |
                          py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if ((array.flags() & kLayout) != kLayout) {
    std::vector<std::string> strides;
    for (py::ssize_t d = 0; d < array.ndim(); ++d) {
      strides.push_back(std::to_string(array.strides(d)));
    }
    throw py::value_error(std::string(name) +
                          " must be C-contiguous and aligned, got strides of " + join(strides) +
                          " bytes");
  }
  return array;
}

const float* data(const py::array& array) { return static_cast<const float*>(array.data()); }

std::unique_ptr<iqmpc::NormedLinear> pack(const py::object& weight, const py::object& bias,
                                          const py::object& gamma, const py::object& beta,
                                          const std::optional<std::string>& isa) {
  const py::array w = checked(weight, "weight", {"O", "I"});
  const py::ssize_t out = w.shape(0);
  const py::array b = checked(bias, "bias", {out});
  const py::array g = checked(gamma, "gamma", {out});
  const py::array e = checked(beta, "beta", {out});
  const iqmpc::Isa level = isa ? iqmpc::isa_from_name(*isa, "isa") : iqmpc::active_isa();
  py::gil_scoped_release release;
  return std::make_unique<iqmpc::NormedLinear>(data(w), data(b), data(g), data(e), out, w.shape(1),
                                               level);
}

void forward(const iqmpc::NormedLinear& layer, const py::object& x, const py::object& out) {
  const py::array input = checked(x, "x", {"N", layer.in_features()});
  const py::ssize_t rows = input.shape(0);
  py::array output = checked(out, "out", {rows, layer.out_features()});
  if (!output.writeable()) throw py::value_error("out must be writeable");
  auto* y = static_cast<float*>(output.mutable_data());
  if (data(input) < y + output.size() && y < data(input) + input.size()) {
    throw py::value_error("x and out must not overlap");
  }
  py::gil_scoped_release release;
  layer.forward(data(input), rows, y);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU kernels over NumPy arrays; iqmpc.kernels has the public operations.";

  module.def(
      "isa_levels",
      [] {
        std::vector<std::string> names;
        for (const iqmpc::Isa isa : iqmpc::isa_levels()) names.emplace_back(iqmpc::isa_name(isa));
        return names;
      },
      "Names of the instruction-set levels this machine runs, best last.");
  module.def(
      "isa", [] { return std::string(iqmpc::isa_name(iqmpc::active_isa())); },
      "Name of the level that layers packed now use: the best one, or the one the environment "
      "variable IQMPC_ISA names. Raises ValueError where that one is unknown or cannot run.");

  py::class_<iqmpc::NormedLinear>(
      module, "NormedLinear",
      "mish(layer_norm(x W^T + bias) * gamma + beta) with weights packed for one instruction-set "
      "level.")
      .def(py::init(&pack), py::arg("weight"), py::arg("bias"), py::arg("gamma"), py::arg("beta"),
           py::kw_only(), py::arg("isa") = py::none(),
           "Pack float32 weight [O, I] and bias, gamma, beta [O], all copied. isa names a level "
           "of isa_levels() other than isa(). Raises ValueError for wrong shapes, dtypes, layouts "
           "and values that are not finite.")
      .def("forward", &forward, py::arg("x"), py::arg("out"),
           "Write the layer's outputs for float32 x [N, I] into float32 out [N, O].")
      .def_property_readonly("in_features", &iqmpc::NormedLinear::in_features)
      .def_property_readonly("out_features", &iqmpc::NormedLinear::out_features)
      .def_property_readonly("isa", [](const iqmpc::NormedLinear& layer) {
        return std::string(iqmpc::isa_name(layer.isa()));
      });
}
