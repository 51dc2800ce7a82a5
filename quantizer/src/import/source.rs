//! Where the GGUF bytes come from: plain files, parts, zip archives.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use awqua::checkpoint::gguf::{Gguf, GgufModel};
use awqua::checkpoint::map_file;
use awqua::tensor::Bytes;
use awqua::{Error, ErrorKind, Result};
use sha2::{Digest, Sha256};
use zip::result::ZipError;
use zip::{CompressionMethod, ZipArchive};

use super::{ImportProgress, ImportStage};

/// Weights hardly compress: an archive member that claims to grow by more than this factor is a bomb.
const MAX_RATIO: u64 = 100;
/// Growth that is always allowed, in bytes, so that small members of zeros pass.
const FREE_GROWTH: u64 = 1 << 20;
const CHUNK: usize = 1 << 20;

/// The model of a source, opened.
pub(super) struct Assembled {
    pub(super) model: GgufModel,
    pub(super) sha256: Option<String>,
}

/// A piece of the source in its place in the order.
struct Piece {
    /// File name without folders, which gives the order.
    name: String,
    /// File to name in errors.
    file: PathBuf,
    content: Content,
}

enum Content {
    Bytes(Bytes),
    /// Compressed: the member at this index of the archive `file`.
    Deflated {
        index: usize,
        size: u64,
    },
}

impl Piece {
    fn len(&self) -> u64 {
        match &self.content {
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::Deflated { size, .. } => *size,
        }
    }
}

/// Opens, orders, joins and checks `files`; temporary files go to `work`.
pub(super) fn assemble(
    files: &[PathBuf],
    work: &Path,
    sha256: Option<&str>,
    progress: &mut dyn FnMut(ImportProgress),
) -> Result<Assembled> {
    let mut pieces = Vec::new();
    let mut archives = 0;
    let files = with_split_siblings(files)?;
    for file in &files {
        let bytes = map_file(file)?;
        if bytes.starts_with(b"PK\x03\x04") {
            archives += 1;
            pieces.extend(archive_pieces(file, &bytes)?);
        } else {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            pieces.push(Piece { name, file: file.clone(), content: Content::Bytes(bytes) });
        }
    }
    let Some(first) = files.first() else {
        return Err(Error::new(ErrorKind::InvalidInput, "no file to import"));
    };
    if archives > 0 && archives < files.len() {
        return Err(Error::new(ErrorKind::InvalidInput, "archives and plain files can not be mixed").in_file(first));
    }
    if pieces.is_empty() {
        return Err(
            Error::new(ErrorKind::InvalidFile, "the archive holds no GGUF file and no part of one").in_file(first)
        );
    }
    put_in_order(&mut pieces, archives > 0)?;

    let mut reader = PieceReader::new(&pieces, work, sha256, progress)?;
    let parts = reader.read(&pieces)?;
    let sha256 = reader.check_digest(first)?;
    let ggufs = parts.into_iter().map(|(bytes, file)| Gguf::parse(bytes, &file)).collect::<Result<Vec<_>>>()?;
    Ok(Assembled { model: GgufModel::new(ggufs)?, sha256 })
}

/// Adds the other parts when one part `NAME-00001-of-0000N.gguf` alone is given.
fn with_split_siblings(files: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let [file] = files else { return Ok(files.to_vec()) };
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let Some((prefix, count)) = split_name(&name) else { return Ok(files.to_vec()) };
    if !(1..=99_999).contains(&count) {
        return Err(Error::new(ErrorKind::InvalidInput, format!("{count} parts")).in_file(file));
    }
    Ok((1..=count).map(|i| file.with_file_name(format!("{prefix}-{i:05}-of-{count:05}.gguf"))).collect())
}

/// Prefix and number of parts of a name `PREFIX-00001-of-0000N.gguf`.
fn split_name(name: &str) -> Option<(&str, u32)> {
    let stem = name.strip_suffix(".gguf")?;
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (prefix, index) = rest.rsplit_once('-')?;
    let five_digits = |s: &str| s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit());
    if !five_digits(index) || !five_digits(count) {
        return None;
    }
    Some((prefix, count.parse().ok()?))
}

/// The GGUF files inside the archive `file`, or if there are none the parts of one.
fn archive_pieces(file: &Path, bytes: &Bytes) -> Result<Vec<Piece>> {
    let mut archive = open_archive(file)?;
    let mut whole = Vec::new();
    let mut parts = Vec::new();
    for index in 0..archive.len() {
        let member = archive.by_index_raw(index).map_err(|e| zip_error(file, &e))?;
        let path = String::from_utf8_lossy(member.name_raw()).into_owned();
        let name = path.rsplit(['/', '\\']).next().unwrap_or_default().to_owned();
        if name.to_lowercase().ends_with(".gguf") {
            whole.push((index, path, name));
        } else if is_part_name(&name) {
            parts.push((index, path, name));
        }
    }
    let chosen = if whole.is_empty() { parts } else { whole };
    let mut pieces = Vec::new();
    for (index, path, name) in chosen {
        let content = member_content(&mut archive, index, bytes)
            .map_err(|e| Error::new(e.kind(), format!("member `{path}`: {}", e.message())).in_file(file))?;
        pieces.push(Piece { name, file: file.to_path_buf(), content });
    }
    Ok(pieces)
}

fn open_archive(file: &Path) -> Result<ZipArchive<BufReader<File>>> {
    let opened = File::open(file).map_err(|e| Error::io(file, &e))?;
    ZipArchive::new(BufReader::new(opened)).map_err(|e| zip_error(file, &e))
}

/// Whether a member looks like a raw piece of a model: `part01.bin`, `model.gguf.part3`, `model.gguf.001`.
fn is_part_name(name: &str) -> bool {
    let name = name.to_lowercase();
    let stem = name.strip_suffix(".bin").or_else(|| name.strip_suffix(".dat")).unwrap_or(&name);
    stem.ends_with(|c: char| c.is_ascii_digit()) && ["part", "gguf", "chunk", "shard"].iter().any(|w| stem.contains(w))
}

/// Checks a member and finds its bytes: in place if it is stored, to be extracted if it is compressed.
fn member_content(archive: &mut ZipArchive<BufReader<File>>, index: usize, bytes: &Bytes) -> Result<Content> {
    let here = Path::new("");
    let mut member = archive.by_index(index).map_err(|e| zip_error(here, &e))?;
    if member.enclosed_name().is_none() {
        return Err(Error::new(ErrorKind::InvalidFile, "the name leaves the archive"));
    }
    let (size, compressed) = (member.size(), member.compressed_size());
    if compressed > bytes.len() as u64 || size > compressed.saturating_mul(MAX_RATIO).saturating_add(FREE_GROWTH) {
        return Err(Error::new(
            ErrorKind::InvalidFile,
            format!("claims to grow from {compressed} to {size} bytes, more than a model can"),
        ));
    }
    match member.compression() {
        CompressionMethod::Stored => {
            let start = member.data_start().and_then(|start| usize::try_from(start).ok());
            let end = start.zip(usize::try_from(size).ok()).and_then(|(start, size)| start.checked_add(size));
            let stored = start.zip(end).and_then(|(start, end)| bytes.slice(start..end));
            // Reading it once through the archive checks its CRC.
            io::copy(&mut member, &mut io::sink()).map_err(|e| Error::new(ErrorKind::InvalidFile, e.to_string()))?;
            stored
                .map(Content::Bytes)
                .ok_or_else(|| Error::new(ErrorKind::InvalidFile, "its bytes are not inside the archive"))
        }
        CompressionMethod::Deflated => Ok(Content::Deflated { index, size }),
        other => Err(Error::new(ErrorKind::Unsupported, format!("compression {other} is not supported"))),
    }
}

fn zip_error(file: &Path, error: &ZipError) -> Error {
    let kind = match error {
        ZipError::UnsupportedArchive(_) | ZipError::InvalidPassword => ErrorKind::Unsupported,
        _ => ErrorKind::InvalidFile,
    };
    let error = Error::new(kind, format!("zip archive: {error}"));
    if file.as_os_str().is_empty() { error } else { error.in_file(file) }
}

/// A name cut into texts and numbers, so that `part10` comes after `part9`.
fn natural_key(name: &str) -> Vec<(String, Option<u64>)> {
    let mut key: Vec<(String, Option<u64>)> = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let text = rest[digits..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |at| digits + at);
        // Runs that do not fit stay texts; they can not be part numbers.
        match rest[..digits].parse() {
            Ok(number) => key.push((String::new(), Some(number))),
            Err(_) => key.push((rest[..digits].to_owned(), None)),
        }
        key.push((rest[digits..text].to_owned(), None));
        rest = &rest[text..];
    }
    key
}

/// Sorts pieces by the number in their names and refuses gaps and repetitions.
fn put_in_order(pieces: &mut [Piece], archived: bool) -> Result<()> {
    if pieces.len() < 2 {
        return Ok(());
    }
    pieces.sort_by_cached_key(|piece| natural_key(&piece.name));
    let keys: Vec<_> = pieces.iter().map(|piece| natural_key(&piece.name)).collect();
    let alike = |a: &[(String, Option<u64>)], b: &[(String, Option<u64>)]| {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.0 == b.0 && a.1.is_some() == b.1.is_some())
    };
    let varying: Vec<usize> =
        (0..keys[0].len()).filter(|at| keys.iter().any(|key| key.get(*at) != keys[0].get(*at))).collect();
    let numbered = keys.iter().all(|key| alike(key, &keys[0])) && varying.len() < 2;
    if !numbered {
        let named_gguf = pieces.iter().any(|piece| piece.name.to_lowercase().ends_with(".gguf"));
        if archived || named_gguf {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("`{}` and `{}` are not numbered parts of one model", pieces[0].name, pieces[1].name),
            )
            .in_file(&pieces[1].file));
        }
        // Names as `split` makes them, `x.aa`, `x.ab`: their order is all there is to know.
        return Ok(());
    }
    let number = |key: &[(String, Option<u64>)]| varying.first().and_then(|at| key[*at].1).unwrap_or(0);
    let first = number(&keys[0]);
    for (offset, (key, piece)) in keys.iter().zip(pieces.iter()).enumerate() {
        let expected = first.saturating_add(offset as u64);
        let found = number(key);
        if found != expected || first > 1 {
            let expected = if first > 1 { 1 } else { expected };
            return Err(Error::new(
                ErrorKind::InvalidFile,
                format!("part {expected} is missing or part {found} is there twice"),
            )
            .in_file(&piece.file));
        }
    }
    Ok(())
}

/// Reads pieces once, in order: extracts, joins, hashes.
struct PieceReader<'a> {
    work: &'a Path,
    digest: Option<(Sha256, String)>,
    progress: &'a mut dyn FnMut(ImportProgress),
    done: u64,
    total: u64,
}

impl<'a> PieceReader<'a> {
    fn new(
        pieces: &[Piece],
        work: &'a Path,
        sha256: Option<&str>,
        progress: &'a mut dyn FnMut(ImportProgress),
    ) -> Result<Self> {
        let digest = match sha256 {
            None => None,
            Some(hex) if hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()) => {
                Some((Sha256::new(), hex.to_ascii_lowercase()))
            }
            Some(other) => {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!("`{other}` is not a SHA-256: expected 64 hexadecimal digits"),
                ));
            }
        };
        let total = pieces.iter().fold(0u64, |sum, piece| sum.saturating_add(piece.len()));
        Ok(Self { work, digest, progress, done: 0, total })
    }

    /// The GGUF files the pieces make: one for each self-contained part, one for raw pieces together.
    fn read(&mut self, pieces: &[Piece]) -> Result<Vec<(Bytes, PathBuf)>> {
        let mut files: Vec<(Bytes, PathBuf)> = Vec::new();
        for (at, piece) in pieces.iter().enumerate() {
            let magic = first_bytes(piece)?;
            if at == 0 && magic != *b"GGUF" {
                return Err(Error::new(ErrorKind::InvalidFile, format!("`{}` does not begin with `GGUF`", piece.name))
                    .in_file(&piece.file));
            }
            let self_contained = pieces.len() > 1 && first_bytes(&pieces[1])? == *b"GGUF";
            if pieces.len() == 1 || self_contained {
                let bytes = match &piece.content {
                    Content::Bytes(bytes) => {
                        self.copy(piece, &mut io::sink(), None)?;
                        bytes.clone()
                    }
                    Content::Deflated { .. } => {
                        let path = self.work.join(format!("source-{at}.gguf"));
                        self.extract(std::slice::from_ref(piece), &path)?
                    }
                };
                files.push((bytes, piece.file.clone()));
            } else {
                let path = self.work.join("source.gguf");
                return Ok(vec![(self.extract(pieces, &path)?, piece.file.clone())]);
            }
        }
        Ok(files)
    }

    /// Writes pieces one after the other to `path` and maps it.
    fn extract(&mut self, pieces: &[Piece], path: &Path) -> Result<Bytes> {
        let mut file = File::create_new(path).map_err(|e| Error::io(path, &e))?;
        for piece in pieces {
            self.copy(piece, &mut file, Some(path))?;
        }
        file.flush().map_err(|e| Error::io(path, &e))?;
        drop(file);
        let expected = pieces.iter().fold(0u64, |sum, piece| sum.saturating_add(piece.len()));
        let found = fs::metadata(path).map_err(|e| Error::io(path, &e))?.len();
        if found != expected {
            return Err(Error::new(ErrorKind::Io, format!("{found} bytes written, expected {expected}")).in_file(path));
        }
        map_file(path)
    }

    /// Copies one piece to `out` (the file `out_path`) through the digest; never more than the size it declares.
    fn copy(&mut self, piece: &Piece, out: &mut dyn Write, out_path: Option<&Path>) -> Result<()> {
        match &piece.content {
            Content::Bytes(_) if self.digest.is_none() && out_path.is_none() => {
                self.done += piece.len();
                self.tell();
                Ok(())
            }
            Content::Bytes(bytes) => {
                for chunk in bytes.chunks(CHUNK) {
                    self.put(chunk, out, out_path)?;
                }
                bytes.release();
                Ok(())
            }
            Content::Deflated { index, size } => {
                let mut archive = open_archive(&piece.file)?;
                let mut member = archive.by_index(*index).map_err(|e| zip_error(&piece.file, &e))?;
                let broken = |reason: String| {
                    Error::new(ErrorKind::InvalidFile, format!("member `{}`: {reason}", piece.name))
                        .in_file(&piece.file)
                };
                let mut buffer = vec![0; CHUNK];
                let mut copied = 0u64;
                loop {
                    let n = member.read(&mut buffer).map_err(|e| broken(e.to_string()))?;
                    copied += n as u64;
                    if copied > *size || (n == 0 && copied < *size) {
                        return Err(broken(format!("{copied} bytes unpacked, the archive declares {size}")));
                    }
                    if n == 0 {
                        return Ok(());
                    }
                    self.put(&buffer[..n], out, out_path)?;
                }
            }
        }
    }

    fn put(&mut self, chunk: &[u8], out: &mut dyn Write, out_path: Option<&Path>) -> Result<()> {
        if let Some((digest, _)) = &mut self.digest {
            digest.update(chunk);
        }
        out.write_all(chunk).map_err(|e| Error::io(out_path.unwrap_or(self.work), &e))?;
        self.done += chunk.len() as u64;
        self.tell();
        Ok(())
    }

    fn tell(&mut self) {
        (self.progress)(ImportProgress { stage: ImportStage::Read, done: self.done, total: self.total });
    }

    /// Compares the digest of everything read with the expected one and returns it.
    fn check_digest(self, first: &Path) -> Result<Option<String>> {
        let Some((digest, expected)) = self.digest else { return Ok(None) };
        let found: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if found != expected {
            return Err(
                Error::new(ErrorKind::InvalidFile, format!("SHA-256 is {found}, expected {expected}")).in_file(first)
            );
        }
        Ok(Some(found))
    }
}

fn first_bytes(piece: &Piece) -> Result<[u8; 4]> {
    let mut magic = [0; 4];
    match &piece.content {
        Content::Bytes(bytes) => {
            if let Some(bytes) = bytes.get(..4) {
                magic.copy_from_slice(bytes);
            }
        }
        Content::Deflated { index, .. } => {
            let mut archive = open_archive(&piece.file)?;
            let member = archive.by_index(*index).map_err(|e| zip_error(&piece.file, &e))?;
            let mut head = Vec::new();
            member.take(4).read_to_end(&mut head).map_err(|e| {
                Error::new(ErrorKind::InvalidFile, format!("member `{}`: {e}", piece.name)).in_file(&piece.file)
            })?;
            if head.len() == 4 {
                magic.copy_from_slice(&head);
            }
        }
    }
    Ok(magic)
}
