//! The part of Python's pickle language that a dictionary of tensors is written in.
//!
//! Instructions after CPython's `pickletools`, protocols 2 to 4; the functions that `torch.save` calls after
//! `torch._utils`. Values live in an arena and refer to each other by number: what a hostile file nests or makes
//! circular costs no stack and is freed at once.

use ::safetensors::Dtype;

use crate::error::{Error, ErrorKind, Result};

use super::super::safetensors::{MAX_TENSORS, check_name};
use super::invalid;

/// Most values of a pickle; bounds what a file of a given size can cost.
const MAX_VALUES: usize = 8 << 20;
/// Most dimensions of a tensor.
const MAX_RANK: usize = 8;
/// Longest key of a storage, bytes; `torch.save` counts from 0. A value of the pickle can be used any number of times,
/// so what is copied for each use has to be short.
const MAX_KEY: usize = 64;

/// A tensor as the pickle describes it.
#[derive(Debug, Clone)]
pub(super) struct Tensor {
    pub dtype: Dtype,
    /// Key of the storage.
    pub storage: String,
    /// First element in the storage.
    pub offset: usize,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Elements between neighbours of each dimension.
    pub stride: Vec<usize>,
}

/// Number of a value in the arena.
type Id = usize;

#[derive(Debug, Clone)]
enum Value {
    Mark,
    None,
    Bool,
    Int(i64),
    Float,
    Text(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Function(Function),
    Storage { dtype: Dtype, key: String },
    Tensor(Box<Tensor>),
}

/// What may be named.
#[derive(Debug, Clone, Copy)]
enum Function {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Dtype),
}

impl Function {
    fn of(module: &str, name: &str) -> Result<Self> {
        let dtype = |dtype| Ok(Self::Storage(dtype));
        match (module, name) {
            ("collections", "OrderedDict") => Ok(Self::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => Ok(Self::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Ok(Self::RebuildParameter),
            ("torch", "HalfStorage") => dtype(Dtype::F16),
            ("torch", "BFloat16Storage") => dtype(Dtype::BF16),
            ("torch", "FloatStorage") => dtype(Dtype::F32),
            ("torch", "DoubleStorage") => dtype(Dtype::F64),
            ("torch", "LongStorage") => dtype(Dtype::I64),
            ("torch", "IntStorage") => dtype(Dtype::I32),
            ("torch", "ShortStorage") => dtype(Dtype::I16),
            ("torch", "CharStorage") => dtype(Dtype::I8),
            ("torch", "ByteStorage") => dtype(Dtype::U8),
            ("torch", "BoolStorage") => dtype(Dtype::BOOL),
            _ => Err(unsupported(format!("a pickle that calls {module}.{name}, not a dictionary of tensors"))),
        }
    }
}

/// The tensors of a pickled dictionary, by name.
///
/// # Errors
/// [`ErrorKind::InvalidFile`] for what is no pickle, [`ErrorKind::Unsupported`] for one of anything else.
pub(super) fn tensors(pickle: &[u8]) -> Result<Vec<(String, Tensor)>> {
    let mut machine = Machine { rest: pickle, values: Vec::new(), stack: Vec::new(), memo: Vec::new() };
    let top = machine.run()?;
    let Value::Dict(items) = &machine.values[top] else {
        return Err(unsupported("a pickle that is no dictionary of tensors"));
    };
    let mut tensors = Vec::new();
    for &(key, value) in items {
        // Training scripts store other things beside, under keys of their own.
        if let (Value::Text(name), Value::Tensor(tensor)) = (&machine.values[key], &machine.values[value]) {
            check_name(name).map_err(invalid)?;
            if tensors.len() == MAX_TENSORS {
                return Err(invalid(format!("more than {MAX_TENSORS} tensors")));
            }
            tensors.push((name.clone(), (**tensor).clone()));
        }
    }
    if tensors.is_empty() {
        return Err(unsupported("a dictionary without tensors"));
    }
    Ok(tensors)
}

struct Machine<'a> {
    rest: &'a [u8],
    values: Vec<Value>,
    stack: Vec<Id>,
    memo: Vec<Id>,
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<Id> {
        loop {
            match self.take(1)?[0] {
                // PROTO, FRAME
                0x80 => drop(self.take(1)?),
                0x95 => drop(self.take(8)?),
                b'(' => self.push(Value::Mark)?,
                b'N' => self.push(Value::None)?,
                0x88 | 0x89 => self.push(Value::Bool)?,
                b'J' => {
                    let value = i32::from_le_bytes(self.array()?);
                    self.push(Value::Int(value.into()))?;
                }
                b'K' => {
                    let value = self.take(1)?[0];
                    self.push(Value::Int(value.into()))?;
                }
                b'M' => {
                    let value = u16::from_le_bytes(self.array()?);
                    self.push(Value::Int(value.into()))?;
                }
                // LONG1: a signed number of as many bytes as it takes.
                0x8a => {
                    let length = self.take(1)?[0];
                    let bytes = self.take(length.into())?;
                    let value = long(bytes).ok_or_else(|| invalid("a number of more than 8 bytes in the pickle"))?;
                    self.push(Value::Int(value))?;
                }
                b'G' => {
                    self.take(8)?;
                    self.push(Value::Float)?;
                }
                b'X' => {
                    let length = u32::from_le_bytes(self.array()?);
                    self.text(length as usize)?;
                }
                0x8c => {
                    let length = self.take(1)?[0];
                    self.text(length.into())?;
                }
                b')' => self.push(Value::Tuple(Vec::new()))?,
                b']' => self.push(Value::List(Vec::new()))?,
                b'}' => self.push(Value::Dict(Vec::new()))?,
                count @ 0x85..=0x87 => {
                    let items = self.pop_many(usize::from(count) - 0x84)?;
                    self.push(Value::Tuple(items))?;
                }
                b't' => {
                    let items = self.pop_to_mark()?;
                    self.push(Value::Tuple(items))?;
                }
                b'a' => {
                    let items = self.pop_many(1)?;
                    self.append(items)?;
                }
                b'e' => {
                    let items = self.pop_to_mark()?;
                    self.append(items)?;
                }
                b's' => {
                    let items = self.pop_many(2)?;
                    self.set(&items)?;
                }
                b'u' => {
                    let items = self.pop_to_mark()?;
                    self.set(&items)?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.push(Value::Function(Function::of(module, name)?))?;
                }
                0x93 => {
                    let names = self.pop_many(2)?;
                    let [Value::Text(module), Value::Text(name)] = [&self.values[names[0]], &self.values[names[1]]]
                    else {
                        return Err(invalid("names that are no text in the pickle"));
                    };
                    let function = Function::of(module, name)?;
                    self.push(Value::Function(function))?;
                }
                b'q' => {
                    let at = self.take(1)?[0];
                    self.remember(at.into())?;
                }
                b'r' => {
                    let at = u32::from_le_bytes(self.array()?);
                    self.remember(at as usize)?;
                }
                0x94 => self.remember(self.memo.len())?,
                b'h' => {
                    let at = self.take(1)?[0];
                    self.recall(at.into())?;
                }
                b'j' => {
                    let at = u32::from_le_bytes(self.array()?);
                    self.recall(at as usize)?;
                }
                b'Q' => {
                    let id = self.pop()?;
                    let storage = self.storage(id)?;
                    self.push(storage)?;
                }
                b'R' => {
                    let called = self.pop_many(2)?;
                    let result = self.call(called[0], called[1])?;
                    self.push(result)?;
                }
                // BUILD gives an object attributes; those of an OrderedDict are versions of modules.
                b'b' => drop(self.pop()?),
                b'.' => return self.pop(),
                other => return Err(unsupported(format!("instruction {other:#04x} in a pickle of weights"))),
            }
        }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let (taken, rest) =
            self.rest.split_at_checked(count).ok_or_else(|| invalid("the pickle ends early: truncated?"))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.take(N)?.try_into().map_err(|_| invalid("the pickle ends early: truncated?"))
    }

    fn line(&mut self) -> Result<&'a str> {
        let end = self.rest.iter().take(256).position(|&byte| byte == b'\n');
        let line = self.take(end.ok_or_else(|| invalid("a name without an end in the pickle"))?)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(|_| invalid("a name in the pickle is not UTF-8"))
    }

    fn text(&mut self, length: usize) -> Result<()> {
        let text = std::str::from_utf8(self.take(length)?).map_err(|_| invalid("a text in the pickle is not UTF-8"))?;
        self.push(Value::Text(text.to_owned()))
    }

    fn push(&mut self, value: Value) -> Result<()> {
        if self.values.len() == MAX_VALUES {
            return Err(invalid(format!("more than {MAX_VALUES} values in the pickle")));
        }
        self.stack.push(self.values.len());
        self.values.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Result<Id> {
        self.stack.pop().ok_or_else(|| invalid("the pickle takes more than it has"))
    }

    fn pop_many(&mut self, count: usize) -> Result<Vec<Id>> {
        let at = self.stack.len().checked_sub(count).ok_or_else(|| invalid("the pickle takes more than it has"))?;
        Ok(self.stack.split_off(at))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self.stack.iter().rposition(|&id| matches!(self.values[id], Value::Mark));
        let items = self.stack.split_off(mark.ok_or_else(|| invalid("a mark is missing in the pickle"))? + 1);
        self.stack.pop();
        Ok(items)
    }

    fn top(&mut self) -> Result<&mut Value> {
        let &id = self.stack.last().ok_or_else(|| invalid("the pickle takes more than it has"))?;
        Ok(&mut self.values[id])
    }

    fn append(&mut self, items: Vec<Id>) -> Result<()> {
        match self.top()? {
            Value::List(list) => list.extend(items),
            _ => return Err(invalid("the pickle appends to what is no list")),
        }
        Ok(())
    }

    fn set(&mut self, items: &[Id]) -> Result<()> {
        let (pairs, rest) = items.as_chunks::<2>();
        match self.top()? {
            Value::Dict(dict) if rest.is_empty() => dict.extend(pairs.iter().map(|&[key, value]| (key, value))),
            _ => return Err(invalid("the pickle fills what is no dictionary")),
        }
        Ok(())
    }

    fn remember(&mut self, at: usize) -> Result<()> {
        let &id = self.stack.last().ok_or_else(|| invalid("the pickle takes more than it has"))?;
        match at {
            at if at < self.memo.len() => self.memo[at] = id,
            at if at == self.memo.len() => self.memo.push(id),
            _ => return Err(invalid("the pickle's memo has a gap")),
        }
        Ok(())
    }

    fn recall(&mut self, at: usize) -> Result<()> {
        let &id = self.memo.get(at).ok_or_else(|| invalid("the pickle recalls what it never remembered"))?;
        self.stack.push(id);
        // The stack is bounded by the length of the pickle.
        Ok(())
    }

    /// `("storage", type, key, device, elements)`
    fn storage(&self, id: Id) -> Result<Value> {
        let wrong = || invalid("a storage that is described in another way than `torch.save` does");
        let Value::Tuple(items) = &self.values[id] else { return Err(wrong()) };
        let &[kind, dtype, key, ..] = &items[..] else { return Err(wrong()) };
        match (&self.values[kind], &self.values[dtype], &self.values[key]) {
            (Value::Text(kind), Value::Function(Function::Storage(dtype)), Value::Text(key))
                if kind == "storage" && key.len() <= MAX_KEY =>
            {
                Ok(Value::Storage { dtype: *dtype, key: key.clone() })
            }
            _ => Err(wrong()),
        }
    }

    fn call(&self, function: Id, arguments: Id) -> Result<Value> {
        let wrong = || invalid("a tensor that is described in another way than `torch.save` does");
        let (Value::Function(function), Value::Tuple(arguments)) = (&self.values[function], &self.values[arguments])
        else {
            return Err(wrong());
        };
        match (function, &arguments[..]) {
            (Function::OrderedDict, []) => Ok(Value::Dict(Vec::new())),
            (Function::RebuildParameter, &[tensor, ..]) => match &self.values[tensor] {
                tensor @ Value::Tensor(_) => Ok(tensor.clone()),
                _ => Err(wrong()),
            },
            (Function::RebuildTensor, &[storage, offset, shape, stride, ..]) => {
                let Value::Storage { dtype, key } = &self.values[storage] else { return Err(wrong()) };
                let offset = self.size(offset).ok_or_else(wrong)?;
                let (shape, stride) = (self.sizes(shape).ok_or_else(wrong)?, self.sizes(stride).ok_or_else(wrong)?);
                if shape.len() != stride.len() {
                    return Err(wrong());
                }
                Ok(Value::Tensor(Box::new(Tensor { dtype: *dtype, storage: key.clone(), offset, shape, stride })))
            }
            _ => Err(wrong()),
        }
    }

    fn size(&self, id: Id) -> Option<usize> {
        match self.values[id] {
            Value::Int(value) => usize::try_from(value).ok(),
            _ => None,
        }
    }

    fn sizes(&self, id: Id) -> Option<Vec<usize>> {
        let Value::Tuple(items) = &self.values[id] else { return None };
        if items.len() > MAX_RANK {
            return None;
        }
        items.iter().map(|&id| self.size(id)).collect()
    }
}

/// A little-endian two's complement number.
fn long(bytes: &[u8]) -> Option<i64> {
    let fill = if bytes.last().is_some_and(|byte| byte & 0x80 != 0) { 0xff } else { 0 };
    let mut wide = [fill; 8];
    wide.get_mut(..bytes.len())?.copy_from_slice(bytes);
    Some(i64::from_le_bytes(wide))
}

fn unsupported(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A dictionary of one tensor, 2 elements of the storage `key`, under `first` and `uses` other names.
    fn pickle(name: &str, key: &str, uses: usize) -> Vec<u8> {
        let text = |text: &str| [&b"X"[..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
        let mut bytes =
            [b"\x80\x02}".to_vec(), text("first"), b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec()].concat();
        bytes.extend(text("storage"));
        bytes.extend(b"ctorch\nHalfStorage\n");
        bytes.extend([text(key), text("cpu"), b"K\x02tQK\x00K\x02\x85K\x01\x85\x89}tRq\x00s".to_vec()].concat());
        for i in 0..uses {
            bytes.extend([text(&format!("{name}{i}")), b"h\x00s".to_vec()].concat());
        }
        bytes.push(b'.');
        bytes
    }

    #[test]
    fn what_is_copied_for_each_use_is_short() {
        let found = tensors(&pickle("w", "7", 3)).unwrap();
        assert_eq!(found.len(), 4);
        assert_eq!((found[3].0.as_str(), found[3].1.storage.as_str()), ("w2", "7"));
        for (name, key) in [("w", "7".repeat(MAX_KEY + 1)), (&*"w".repeat(1 << 10), "7".to_owned())] {
            assert_eq!(tensors(&pickle(name, &key, 1)).unwrap_err().kind(), ErrorKind::InvalidFile);
        }
    }
}
