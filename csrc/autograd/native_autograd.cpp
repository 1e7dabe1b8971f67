// fused_losses._native_autograd: `Stored` and `Recomputed` of fused_losses/_autograd.py, which says what they are,
// recorded and run without Python: around a small loss, a Function of Python takes longer than the loss.
//
// PyTorch's autograd has no stable ABI: this part alone is compiled for one release, and loaded beside no other.
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <optional>

namespace fused_losses {

using at::Tensor;
using c10::OperatorHandle;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

static OperatorHandle find(const std::string& op) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("fused_losses::" + op).c_str(), "");
}

struct Loss {
  OperatorHandle forward, train, backward;
  bool wide;  // the ops' last argument
};

// Written while a loss is imported, before anyone has its number.
static std::array<std::optional<Loss>, 64> losses;

static int64_t register_loss(const std::string& name, bool wide) {
  for (size_t number = 0; number < losses.size(); ++number) {
    if (losses[number]) continue;
    losses[number] = Loss{find(name), find(name + "_train"), find(name + "_backward"), wide};
    return static_cast<int64_t>(number);
  }
  TORCH_CHECK(false, "there is no room for the loss ", name, ": make `losses` longer");
}

// What an op is given: its input, its other tensors, undefined where absent, and its options, behind the loss's number.
struct Call {
  Tensor input;
  variable_list tensors;
  c10::impl::GenericList options{c10::AnyType::get()};
};

static const Loss& loss_of(const c10::impl::GenericList& options) { return *losses[options.get(0).toInt()]; }

static void push(Stack& stack, const Tensor& tensor) {
  if (tensor.defined())
    stack.emplace_back(tensor);
  else
    stack.emplace_back();
}

static Stack run(const OperatorHandle& op, Stack stack, const c10::impl::GenericList& options) {
  for (size_t i = 1; i < options.size(); ++i) stack.push_back(options.get(i));
  stack.emplace_back(loss_of(options).wide);
  TORCH_INTERNAL_ASSERT(stack.size() == op.schema().arguments().size());
  at::AutoDispatchBelowADInplaceOrView below;  // what is recorded is recorded here
  op.callBoxed(stack);
  return stack;
}

static Stack run(const OperatorHandle& op, const Call& call) {
  Stack stack;
  stack.reserve(16);
  push(stack, call.input);
  for (const Tensor& tensor : call.tensors) push(stack, tensor);
  return run(op, std::move(stack), call.options);
}

static void save(AutogradContext* ctx, const Call& call, std::initializer_list<Tensor> first) {
  variable_list saved;
  saved.reserve(first.size() + call.tensors.size());
  saved.insert(saved.end(), first);
  saved.insert(saved.end(), call.tensors.begin(), call.tensors.end());
  ctx->save_for_backward(std::move(saved));
  ctx->set_materialize_grads(false);
  ctx->saved_data.emplace("options", call.options);
  // With hooks on saved tensors, what comes back may be anything of theirs: of other strides, in memory that is
  // read-only or holds other things as well.
  if (at::SavedTensorDefaultHooks::get_hooks()) ctx->saved_data.emplace("hooked", true);
}

static pybind11::object python(const Tensor& tensor) {
  return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(tensor));
}

// The gradient as a function of the upstream gradient and of args: input, tensors.
static Tensor differentiable(const AutogradContext* ctx, const Tensor& upstream, at::ArrayRef<Tensor> args) {
  pybind11::gil_scoped_acquire gil;
  try {
    pybind11::list tensors, options;
    for (const Tensor& tensor : args) tensors.append(python(tensor));
    for (const c10::IValue& option : ctx->saved_data.at("options").toList()) {
      if (option.isBool())
        options.append(option.toBool());
      else if (option.isInt())
        options.append(option.toInt());
      else
        options.append(option.toDouble());
    }
    const auto function = pybind11::module_::import("fused_losses._autograd").attr("differentiable_by_number");
    return THPVariable_Unpack(function(python(upstream), tensors, options).ptr());
  } catch (pybind11::error_already_set& error) {
    error.restore();
    python_error kept;
    kept.persist();  // the engine may pass it on from another thread
    throw kept;
  }
}

// It stands for more than one number: in vmap over a backward pass, in `is_grads_batched`, which has a vmap of its own,
// or as a subclass that calls each op once for every tensor in it.
static bool is_several(const Tensor& upstream) {
  const c10::DispatchKeySet keys = upstream.key_set();
  return keys.has(c10::DispatchKey::FuncTorchBatched) || keys.has(c10::DispatchKey::Batched) ||
         keys.has(c10::DispatchKey::Python);
}

// gradient * upstream, in the gradient's memory where that is possible.
static Tensor scale(const Tensor& gradient, const Tensor& upstream) {
  if (is_several(upstream)) return gradient.mul(upstream);
  static const auto op = find("scale_").typed<void(const Tensor&, const Tensor&)>();
  // A number in the host's memory is read at once; on a GPU only the kernel may look at it, and in a trace nobody.
  if (!upstream.is_cpu() || c10::impl::TorchDispatchModeTLS::any_modes_set() || upstream.item<double>() != 1)
    op.call(gradient, upstream);
  return gradient;
}

}  // namespace fused_losses

using namespace fused_losses;

// Outside of any namespace: PyTorch shows what follows a name's last ::.
struct StoredBackward : torch::autograd::Function<StoredBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor& /*input*/, const Call& call) {
    const Stack results = run(loss_of(call.options).train, call);
    save(ctx, call, {results[1].toTensor(), call.input});
    return results[0].toTensor();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    if (!upstream[0].defined()) return {Tensor(), Tensor()};
    const variable_list saved = ctx->get_saved_variables();
    Tensor gradient = saved[0];
    if (at::GradMode::is_enabled())
      gradient = differentiable(ctx, upstream[0], at::ArrayRef<Tensor>(saved).slice(1));
    else if (ctx->saved_data.count("hooked") || torch::autograd::get_current_graph_task_keep_graph())
      gradient = gradient.mul(upstream[0]);  // it is somebody else's, or serves again
    else
      gradient = scale(gradient, upstream[0]);
    return {gradient, Tensor()};
  }
};

struct RecomputedBackward : torch::autograd::Function<RecomputedBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor& /*input*/, const Call& call) {
    save(ctx, call, {call.input});
    return run(loss_of(call.options).forward, call)[0].toTensor();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    if (!upstream[0].defined()) return {Tensor(), Tensor()};
    const variable_list saved = ctx->get_saved_variables();
    if (at::GradMode::is_enabled()) return {differentiable(ctx, upstream[0], saved), Tensor()};
    const auto options = ctx->saved_data.at("options").toList();
    Stack stack;
    stack.reserve(16);
    push(stack, upstream[0]);
    for (const Tensor& tensor : saved) push(stack, tensor);
    return {run(loss_of(options).backward, std::move(stack), options)[0].toTensor(), Tensor()};
  }
};

// No node, where nothing is recorded: not by way of Python either.
struct Unrecorded {
  static Tensor apply(const Tensor& /*input*/, const Call& call) {
    return run(loss_of(call.options).forward, call)[0].toTensor();
  }
};

static Tensor tensor_or_none(PyObject* argument) {
  if (argument == Py_None) return {};
  if (!THPVariable_Check(argument))
    throw torch::TypeError(std::string("expected a Tensor or None, not ") + Py_TYPE(argument)->tp_name);
  return THPVariable_Unpack(argument);
}

// As the op's schema has it: a boxed kernel takes it unasked.
static c10::IValue option(PyObject* argument, c10::TypeKind kind) {
  if (kind == c10::TypeKind::FloatType) {
    const double number = PyFloat_AsDouble(argument);
    if (number == -1.0 && PyErr_Occurred()) throw python_error();
    return number;
  }
  if (kind == c10::TypeKind::BoolType) {
    const int truth = PyObject_IsTrue(argument);
    if (truth < 0) throw python_error();
    return truth != 0;
  }
  TORCH_INTERNAL_ASSERT(kind == c10::TypeKind::IntType);
  const pybind11::object index = pybind11::reinterpret_steal<pybind11::object>(PyNumber_Index(argument));
  const int64_t number = index ? PyLong_AsLongLong(index.ptr()) : -1;
  if (number == -1 && PyErr_Occurred()) throw python_error();
  return number;
}

static Call call_of(PyObject* const* args, Py_ssize_t count) {
  if (count != 4 || !PyTuple_Check(args[2]) || !PyTuple_Check(args[3]))
    throw torch::TypeError("expected a loss's number, its input, a tuple of tensors and a tuple of options");
  const int64_t number = option(args[0], c10::TypeKind::IntType).toInt();
  TORCH_CHECK_INDEX(number >= 0 && number < int64_t(losses.size()) && losses[number], "there is no loss ", number);
  const auto& schema = losses[number]->forward.schema().arguments();
  const Py_ssize_t tensors = PyTuple_GET_SIZE(args[2]), options = PyTuple_GET_SIZE(args[3]);
  TORCH_CHECK_VALUE(size_t(1 + tensors + options + 1) == schema.size(), "expected ", schema.size() - 2, " arguments");
  Call call;
  call.input = tensor_or_none(args[1]);
  call.tensors.reserve(tensors);
  for (Py_ssize_t i = 0; i < tensors; ++i) call.tensors.push_back(tensor_or_none(PyTuple_GET_ITEM(args[2], i)));
  call.options.reserve(1 + options);
  call.options.push_back(number);
  for (Py_ssize_t i = 0; i < options; ++i)
    call.options.push_back(option(PyTuple_GET_ITEM(args[3], i), schema[1 + tensors + i].type()->kind()));
  return call;
}

template <class Function>
static PyObject* evaluate(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const Call call = call_of(args, count);
  Tensor value;
  try {
    pybind11::gil_scoped_release no_gil;
    value = Function::apply(call.input, call);
  } catch (const std::out_of_range& error) {  // a class index
    PyErr_SetString(PyExc_IndexError, error.what());
    return nullptr;
  }
  return THPVariable_Wrap(value);
  END_HANDLE_TH_ERRORS
}

static PyMethodDef functions[] = {
    {"stored", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&evaluate<StoredBackward>)), METH_FASTCALL,
     nullptr},
    {"recomputed", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&evaluate<RecomputedBackward>)), METH_FASTCALL,
     nullptr},
    {"unrecorded", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&evaluate<Unrecorded>)), METH_FASTCALL,
     nullptr},
    {nullptr, nullptr, 0, nullptr}};

template <class Function>
static void name_node(const char* name) {
  static PyTypeObject type{};
  torch::autograd::registerCppFunction(typeid(torch::autograd::CppNode<Function>),
                                       torch::autograd::_initFunctionPyTypeObject(type, name, nullptr, nullptr));
}

PYBIND11_MODULE(_native_autograd, m) {
  m.doc() = "Stored and Recomputed of fused_losses._autograd, without Python.";
  name_node<StoredBackward>("StoredBackward");
  name_node<RecomputedBackward>("RecomputedBackward");
  m.def("register_loss", &register_loss);
  // METH_FASTCALL: an argument tuple and pybind11's conversions would be felt.
  if (PyModule_AddFunctions(m.ptr(), functions) < 0) throw pybind11::error_already_set();
}
