//! A weight on its way to a backend, whole or in rows, and its form.

use half::f16;

use super::{BlockMatrix, Bytes, DenseMatrix, DenseType, GgmlType, Levels, Offset, PackedMatrix, W4Matrix, row_words};
use crate::error::{Error, ErrorKind, Result};

/// What the levels of a [`PackedMatrix`] are, see [`Levels`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LevelsForm {
    /// Numbers of half precision.
    Affine(Offset),
    /// Numbers of single precision.
    AffineWide(Offset),
    /// A table.
    Codebook,
}

/// Form and size of a weight, known before its bytes are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightShape {
    /// See [`W4Matrix`].
    W4 {
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
        /// Input features of a group.
        group_size: usize,
        /// Meaning of the second number of a group.
        offset: Offset,
    },
    /// See [`PackedMatrix`].
    Packed {
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
        /// Bits of a code.
        bits: u32,
        /// Input features of a group.
        group_size: usize,
        /// What the codes stand for.
        levels: LevelsForm,
        /// What a weight is rounded to.
        rounding: DenseType,
    },
    /// See [`BlockMatrix`].
    Blocks {
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
        /// Type of the blocks.
        ggml_type: GgmlType,
    },
    /// See [`DenseMatrix`].
    Dense {
        /// Rows.
        n: usize,
        /// Columns.
        k: usize,
        /// Element type.
        dtype: DenseType,
    },
    /// Elements of a norm weight, a bias or factors.
    Vector {
        /// Elements.
        len: usize,
    },
    /// Columns in another order.
    Order {
        /// Columns.
        len: usize,
    },
}

impl WeightShape {
    /// Rows by which a weight is handed over: output features, or elements of a vector.
    pub fn rows(&self) -> usize {
        match *self {
            Self::W4 { n, .. } | Self::Packed { n, .. } | Self::Blocks { n, .. } | Self::Dense { n, .. } => n,
            Self::Vector { len } | Self::Order { len } => len,
        }
    }

    /// Whether it is not a matrix, so that any number of its elements make a row.
    pub fn is_vector(&self) -> bool {
        matches!(self, Self::Vector { .. } | Self::Order { .. })
    }

    /// Bytes of `rows` rows in the form that [`Weight`] has them.
    pub fn bytes(&self, rows: usize) -> u64 {
        let row = match *self {
            Self::W4 { k, group_size, .. } => k / 2 + 4 * (k / group_size.max(1)),
            Self::Packed { k, bits, group_size, levels, .. } => {
                let number = if matches!(levels, LevelsForm::AffineWide(_)) { 8 } else { 4 };
                4 * row_words(k, bits) + number * k.div_ceil(group_size.max(1))
            }
            Self::Blocks { k, ggml_type, .. } => k / ggml_type.block_len() * ggml_type.block_bytes(),
            Self::Dense { k, dtype, .. } => k.saturating_mul(dtype.size()),
            Self::Vector { .. } | Self::Order { .. } => 4,
        };
        (rows as u64).saturating_mul(row as u64)
    }

    /// The same form with `rows` rows.
    #[must_use]
    pub fn with_rows(mut self, rows: usize) -> Self {
        match &mut self {
            Self::W4 { n, .. } | Self::Packed { n, .. } | Self::Blocks { n, .. } | Self::Dense { n, .. } => *n = rows,
            Self::Vector { len } | Self::Order { len } => *len = rows,
        }
        self
    }
}

/// A weight on its way to a backend, or some rows of one.
#[derive(Debug, Clone, PartialEq)]
pub enum Weight {
    /// Packed 4-bit matrix in the canonical form.
    W4(W4Matrix),
    /// Packed matrix of another width, precision or meaning.
    Packed(PackedMatrix),
    /// Matrix in blocks of 256 with two levels of scales.
    Blocks(BlockMatrix),
    /// Dense matrix, also embeddings.
    Dense(DenseMatrix),
    /// Norm weight, bias or factors, widened to f32.
    Vector(Vec<f32>),
    /// For each input feature of a matrix, the column of the activations that it takes.
    Order(Vec<u32>),
}

impl Weight {
    /// The rows `rows` in that order, each below the number of rows; of a vector, its elements. Mapped rows are copied.
    pub(crate) fn select_rows(self, rows: &[usize]) -> Self {
        fn pick<T: Copy>(from: &[T], width: usize, rows: &[usize]) -> Vec<T> {
            rows.iter().flat_map(|row| &from[row * width..(row + 1) * width]).copied().collect()
        }
        match self {
            Self::W4(m) => Self::W4(W4Matrix {
                n: rows.len(),
                qweight: pick(&m.qweight, m.k / 8, rows),
                group_params: pick(&m.group_params, m.groups(), rows),
                ..m
            }),
            Self::Packed(m) => {
                let (words, groups) = (m.row_words(), m.groups());
                let levels = match &m.levels {
                    Levels::Affine(offset, params) => Levels::Affine(*offset, pick(params, groups, rows)),
                    Levels::AffineWide(offset, params) => Levels::AffineWide(*offset, pick(params, groups, rows)),
                    Levels::Codebook(table, absmax) => Levels::Codebook(table.clone(), pick(absmax, groups, rows)),
                };
                Self::Packed(PackedMatrix { n: rows.len(), codes: pick(&m.codes, words, rows), levels, ..m })
            }
            Self::Blocks(m) => {
                let bytes = Bytes::owned(pick(&m.bytes, m.row_bytes(), rows));
                Self::Blocks(BlockMatrix { n: rows.len(), bytes, ..m })
            }
            Self::Dense(m) => {
                let bytes = Bytes::owned(pick(&m.bytes, m.row_bytes(), rows));
                Self::Dense(DenseMatrix { n: rows.len(), bytes, ..m })
            }
            Self::Vector(v) => Self::Vector(pick(&v, 1, rows)),
            Self::Order(v) => Self::Order(pick(&v, 1, rows)),
        }
    }

    /// Its form and size.
    pub fn shape(&self) -> WeightShape {
        match self {
            Self::W4(m) => WeightShape::W4 { n: m.n, k: m.k, group_size: m.group_size, offset: m.offset },
            Self::Packed(m) => WeightShape::Packed {
                n: m.n,
                k: m.k,
                bits: m.bits,
                group_size: m.group_size,
                levels: match &m.levels {
                    Levels::Affine(offset, _) => LevelsForm::Affine(*offset),
                    Levels::AffineWide(offset, _) => LevelsForm::AffineWide(*offset),
                    Levels::Codebook(..) => LevelsForm::Codebook,
                },
                rounding: m.rounding,
            },
            Self::Blocks(m) => WeightShape::Blocks { n: m.n, k: m.k, ggml_type: m.ggml_type },
            Self::Dense(m) => WeightShape::Dense { n: m.n, k: m.k, dtype: m.dtype },
            Self::Vector(v) => WeightShape::Vector { len: v.len() },
            Self::Order(v) => WeightShape::Order { len: v.len() },
        }
    }

    /// Rows and columns; a vector is one row.
    pub fn dims(&self) -> (usize, usize) {
        match self {
            Self::W4(m) => (m.n, m.k),
            Self::Packed(m) => (m.n, m.k),
            Self::Blocks(m) => (m.n, m.k),
            Self::Dense(m) => (m.n, m.k),
            Self::Vector(v) => (1, v.len()),
            Self::Order(v) => (1, v.len()),
        }
    }

    /// Bits of a packed weight; `None` for what is not packed.
    pub fn bits(&self) -> Option<u32> {
        match self {
            Self::W4(_) => Some(4),
            Self::Packed(m) => Some(m.bits),
            Self::Blocks(m) => Some(match m.ggml_type {
                GgmlType::Q4K => 4,
                GgmlType::Q5K => 5,
                _ => 6,
            }),
            Self::Dense(_) | Self::Vector(_) | Self::Order(_) => None,
        }
    }

    /// Gives mapped pages back, see [`Bytes::release`].
    pub fn release(&self) {
        match self {
            Self::Blocks(m) => m.bytes.release(),
            Self::Dense(m) => m.bytes.release(),
            Self::W4(_) | Self::Packed(_) | Self::Vector(_) | Self::Order(_) => {}
        }
    }

    /// Writes row `row` to `out`, whose length is that of a row: the values that are multiplied with.
    ///
    /// # Panics
    /// If the row is out of range or `out` has another length.
    pub fn expand_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.dims().1, "a row has this many columns");
        match self {
            Self::W4(m) => m.dequantize_row(row, out),
            Self::Packed(m) => m.expand(row, 0, out),
            Self::Blocks(m) => m.expand(row, 0, out),
            Self::Dense(m) => m.dtype.widen(&m.bytes[row * m.row_bytes()..][..m.row_bytes()], out),
            Self::Vector(v) => out.copy_from_slice(v),
            Self::Order(v) => out.iter_mut().zip(v).for_each(|(out, &i)| *out = i as f32),
        }
    }

    /// The same rows in a form that holds them with nothing lost: rows whose numbers happen to fit half precision, of a
    /// matrix whose others do not. What needs no other form, or has none, is returned as it is.
    #[must_use]
    pub fn widened(self, shape: &WeightShape) -> Self {
        let WeightShape::Packed { bits, levels: LevelsForm::AffineWide(meaning), rounding, .. } = *shape else {
            return self;
        };
        let wide = |params: &[u32]| {
            let half = |bits: u32| f16::from_bits(bits as u16).to_f32();
            let pairs = params.iter().map(|&params| [half(params), half(params >> 16)]).collect();
            Levels::AffineWide(meaning, pairs)
        };
        match self {
            Self::W4(m) if m.offset.rounded_to(DenseType::F16) == meaning && bits == 4 => Self::Packed(PackedMatrix {
                n: m.n,
                k: m.k,
                bits,
                group_size: m.group_size,
                levels: wide(&m.group_params),
                codes: m.qweight,
                rounding,
            }),
            Self::Packed(m) => match &m.levels {
                Levels::Affine(offset, params) if *offset == meaning => {
                    Self::Packed(PackedMatrix { levels: wide(params), ..m })
                }
                _ => Self::Packed(m),
            },
            other => other,
        }
    }

    /// Puts `rows` behind the rows of this one.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if they are of another form.
    pub fn append(&mut self, rows: Self) -> Result<()> {
        let (mine, theirs) = (self.shape(), rows.shape());
        let other = || Error::new(ErrorKind::InvalidInput, format!("rows of {theirs:?} do not continue {mine:?}"));
        if mine.with_rows(0) != theirs.with_rows(0) {
            return Err(other());
        }
        match (self, rows) {
            (Self::W4(all), Self::W4(rows)) => {
                all.n += rows.n;
                all.qweight.extend_from_slice(&rows.qweight);
                all.group_params.extend_from_slice(&rows.group_params);
            }
            (Self::Packed(all), Self::Packed(rows)) => {
                match (&mut all.levels, rows.levels) {
                    (Levels::Affine(_, all), Levels::Affine(_, rows)) => all.extend_from_slice(&rows),
                    (Levels::AffineWide(_, all), Levels::AffineWide(_, rows)) => all.extend_from_slice(&rows),
                    (Levels::Codebook(table, all), Levels::Codebook(other, rows)) if *table == other => {
                        all.extend_from_slice(&rows);
                    }
                    _ => return Err(other()),
                }
                all.n += rows.n;
                all.codes.extend_from_slice(&rows.codes);
            }
            (Self::Blocks(all), Self::Blocks(rows)) => {
                all.n += rows.n;
                all.bytes = Bytes::owned([&*all.bytes, &*rows.bytes].concat());
            }
            (Self::Dense(all), Self::Dense(rows)) => {
                all.n += rows.n;
                all.bytes = Bytes::owned([&*all.bytes, &*rows.bytes].concat());
            }
            (Self::Vector(all), Self::Vector(rows)) => all.extend_from_slice(&rows),
            (Self::Order(all), Self::Order(rows)) => all.extend_from_slice(&rows),
            _ => return Err(other()),
        }
        Ok(())
    }
}
