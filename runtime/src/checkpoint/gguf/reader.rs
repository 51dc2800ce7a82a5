//! A bounds-checked cursor over the header of a GGUF file.

use super::{Array, Value};
use crate::error::{Error, ErrorKind, Result};

/// Longest string of the metadata, in bytes: beyond any chat template, below what could hurt.
const MAX_STRING: u64 = 1 << 24;
/// Longest key or tensor name, in bytes.
const MAX_NAME: u64 = 65_535;
/// Elements of all arrays of the metadata together: bounds what a small file can make us allocate.
const MAX_ARRAY_ELEMENTS: u64 = 1 << 24;

pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
    array_elements: u64,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0, array_elements: 0 }
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    pub(super) fn remaining(&self) -> usize {
        self.bytes.len() - self.position
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8]> {
        let end = usize::try_from(len).ok().and_then(|len| self.position.checked_add(len));
        let Some(taken) = end.and_then(|end| self.bytes.get(self.position..end)) else {
            return Err(Error::new(
                ErrorKind::InvalidFile,
                format!(
                    "truncated: {len} bytes expected at offset {}, {} are left",
                    self.position,
                    self.bytes.len() - self.position
                ),
            ));
        };
        self.position += taken.len();
        Ok(taken)
    }

    fn array<const LEN: usize>(&mut self) -> Result<[u8; LEN]> {
        let mut out = [0; LEN];
        out.copy_from_slice(self.take(LEN as u64)?);
        Ok(out)
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A key or a tensor name.
    pub(super) fn name(&mut self) -> Result<String> {
        self.string_up_to(MAX_NAME)
    }

    fn string_up_to(&mut self, max: u64) -> Result<String> {
        let at = self.position;
        let len = self.u64()?;
        if len > max {
            return Err(Error::new(
                ErrorKind::InvalidFile,
                format!("string of {len} bytes at offset {at}, at most {max} allowed"),
            ));
        }
        let bytes = self.take(len)?;
        String::from_utf8(bytes.to_vec())
            .map_err(|_| Error::new(ErrorKind::InvalidFile, format!("string at offset {at} is not UTF-8")))
    }

    /// A metadata value with its type in front.
    pub(super) fn value(&mut self) -> Result<Value> {
        let value_type = self.u32()?;
        Ok(match value_type {
            0 | 2 | 4 | 10 => Value::Uint(self.uint(value_type)?),
            1 | 3 | 5 | 11 => Value::Int(self.int(value_type)?),
            6 | 12 => Value::Float(self.float(value_type)?),
            7 => Value::Bool(self.bool()?),
            8 => Value::String(self.string_up_to(MAX_STRING)?),
            9 => Value::Array(self.array_value()?),
            other => return Err(Error::new(ErrorKind::InvalidFile, format!("unknown metadata value type {other}"))),
        })
    }

    fn array_value(&mut self) -> Result<Array> {
        let element_type = self.u32()?;
        let len = self.u64()?;
        let min_bytes: u64 = match element_type {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => return Err(Error::new(ErrorKind::Unsupported, "arrays of arrays are not supported")),
            other => return Err(Error::new(ErrorKind::InvalidFile, format!("unknown array element type {other}"))),
        };
        // Before anything is allocated: the elements have to be in the file, and in all arrays few enough.
        if len.checked_mul(min_bytes).is_none_or(|bytes| bytes > self.remaining() as u64) {
            return Err(Error::new(
                ErrorKind::InvalidFile,
                format!("truncated: array of {len} elements, {} bytes are left", self.remaining()),
            ));
        }
        self.array_elements += len;
        if self.array_elements > MAX_ARRAY_ELEMENTS {
            return Err(Error::new(
                ErrorKind::InvalidFile,
                format!("more than {MAX_ARRAY_ELEMENTS} array elements in the metadata"),
            ));
        }
        Ok(match element_type {
            0 | 2 | 4 | 10 => Array::Uint((0..len).map(|_| self.uint(element_type)).collect::<Result<_>>()?),
            1 | 3 | 5 | 11 => Array::Int((0..len).map(|_| self.int(element_type)).collect::<Result<_>>()?),
            6 | 12 => Array::Float((0..len).map(|_| self.float(element_type)).collect::<Result<_>>()?),
            7 => Array::Bool((0..len).map(|_| self.bool()).collect::<Result<_>>()?),
            _ => Array::String((0..len).map(|_| self.string_up_to(MAX_STRING)).collect::<Result<_>>()?),
        })
    }

    fn uint(&mut self, value_type: u32) -> Result<u64> {
        Ok(match value_type {
            0 => u64::from(self.array::<1>()?[0]),
            2 => u64::from(u16::from_le_bytes(self.array()?)),
            4 => u64::from(self.u32()?),
            _ => self.u64()?,
        })
    }

    fn int(&mut self, value_type: u32) -> Result<i64> {
        Ok(match value_type {
            1 => i64::from(i8::from_le_bytes(self.array()?)),
            3 => i64::from(i16::from_le_bytes(self.array()?)),
            5 => i64::from(i32::from_le_bytes(self.array()?)),
            _ => i64::from_le_bytes(self.array()?),
        })
    }

    fn float(&mut self, value_type: u32) -> Result<f64> {
        Ok(match value_type {
            6 => f64::from(f32::from_le_bytes(self.array()?)),
            _ => f64::from_le_bytes(self.array()?),
        })
    }

    fn bool(&mut self) -> Result<bool> {
        match self.array::<1>()?[0] {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(Error::new(ErrorKind::InvalidFile, format!("boolean value {other}, expected 0 or 1"))),
        }
    }
}
