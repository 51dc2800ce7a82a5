//! Checkpoints from elsewhere than a folder on disk: memory, and files that can only be read.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use awqua::checkpoint::source::{Folder, ReadAt, Source};
use awqua::checkpoint::{Checkpoint, inspect};
use awqua::model::verify;
use awqua::tensor::Bytes;
use awqua::{ErrorKind, Result};

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/formats/autoawq-gemm-g64")
}

fn files() -> BTreeMap<String, Bytes> {
    let entries = std::fs::read_dir(fixture()).unwrap().map(|entry| entry.unwrap()).filter(|e| e.path().is_file());
    entries.map(|e| (e.file_name().into_string().unwrap(), Bytes::owned(std::fs::read(e.path()).unwrap()))).collect()
}

/// Files that offer no view, fail from a byte offset on, and count what is read.
#[derive(Clone)]
struct ReadOnly {
    bytes: Bytes,
    fails_from: u64,
    read: Arc<AtomicU64>,
}

impl ReadAt for ReadOnly {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        if offset + out.len() as u64 > self.fails_from {
            return Err(io::Error::other("the disc was taken out"));
        }
        self.read.fetch_add(out.len() as u64, Ordering::Relaxed);
        self.bytes.read_at(offset, out)
    }
}

struct Pak {
    files: BTreeMap<String, Bytes>,
    fails_from: u64,
    read: Arc<AtomicU64>,
}

impl Folder for Pak {
    fn open(&self, name: &str) -> Result<Option<Arc<dyn ReadAt>>> {
        let file = |bytes: &Bytes| {
            let fails_from = if name.ends_with(".safetensors") { self.fails_from } else { u64::MAX };
            Arc::new(ReadOnly { bytes: bytes.clone(), fails_from, read: self.read.clone() }) as Arc<dyn ReadAt>
        };
        Ok(self.files.get(name).map(file))
    }
}

fn pak(fails_from: u64) -> (Source, Arc<AtomicU64>) {
    let read = Arc::new(AtomicU64::new(0));
    (Source::folder("data.pak", Arc::new(Pak { files: files(), fails_from, read: read.clone() })), read)
}

#[test]
fn every_source_gives_the_same_checkpoint() {
    let disk = Checkpoint::open(&fixture()).unwrap();
    let (read_only, read) = pak(u64::MAX);
    for source in [Source::memory("assets", files()), read_only] {
        let found = Checkpoint::open_source(source).unwrap();
        assert!(read.load(Ordering::Relaxed) < disk.bytes_on_disk() / 4, "opening reads headers only");
        assert_eq!(found.tensors().len(), disk.tensors().len());
        for (found, meant) in found.tensors().zip(disk.tensors()) {
            assert_eq!((&found.name, found.dtype, &found.shape), (&meant.name, meant.dtype, &meant.shape));
            assert_eq!(*found.bytes().unwrap(), *meant.bytes().unwrap());
            assert_eq!(found.byte_len(), found.extent().copy().unwrap().len());
            found.release();
        }
        assert_eq!(inspect(&found).unwrap().device_bytes, inspect(&disk).unwrap().device_bytes);
        assert!(verify(&found).unwrap().is_empty());
    }
}

#[test]
fn reading_that_fails_names_file_and_tensor() {
    let size = files()["model.safetensors"].len() as u64;
    let checkpoint = Checkpoint::open_source(pak(size - 1).0).unwrap();
    let failed: Vec<_> = checkpoint.tensors().filter_map(|tensor| tensor.bytes().err()).collect();
    assert_eq!(failed.len(), 1);
    assert_eq!(failed[0].kind(), ErrorKind::Io);
    let text = failed[0].to_string();
    assert!(text.contains("data.pak/model.safetensors") && text.contains("taken out"), "{text}");
    assert!(failed[0].tensor().is_some(), "{text}");
    assert_eq!(verify(&checkpoint).unwrap().len(), 1);

    let error = Checkpoint::open_source(pak(4).0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("data.pak/model.safetensors"), "{error}");
    let mut without = files();
    without.remove("config.json");
    let error = Checkpoint::open_source(Source::memory("assets", without)).unwrap_err();
    assert!(error.to_string().contains("assets/config.json"), "{error}");
}

#[test]
fn ranges_never_leave_their_file() {
    let source = Source::memory("m", BTreeMap::from([("a".to_owned(), Bytes::owned((0..10).collect()))]));
    let file = source.open("a").unwrap().unwrap();
    let part = file.slice(2..6).unwrap();
    assert_eq!(*part.bytes().unwrap(), [2, 3, 4, 5]);
    assert_eq!(part.slice(1..4).unwrap().copy().unwrap(), [3, 4, 5]);
    let backwards = std::ops::Range { start: 3, end: 2 };
    assert!(part.slice(1..5).is_none() && part.slice(backwards).is_none() && file.slice(0..usize::MAX).is_none());
    let mut out = [0; 3];
    assert_eq!(part.read(2, &mut out).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(part.read(usize::MAX, &mut out).unwrap_err().kind(), ErrorKind::Io);
    part.read(1, &mut out).unwrap();
    assert_eq!(out, [3, 4, 5]);
    assert!(source.open("b").unwrap().is_none());
    assert_eq!(source.read("a", 9).unwrap_err().kind(), ErrorKind::InvalidFile);
    assert_eq!(source.json("a").unwrap_err().kind(), ErrorKind::InvalidFile);
    let alone = Source::file("one", Arc::new(Bytes::owned(vec![7])));
    assert_eq!(*alone.whole().unwrap().bytes().unwrap(), [7]);
    assert!(alone.open("one").unwrap().is_none());
    assert_eq!(Source::path("/nowhere/at/all").unwrap_err().kind(), ErrorKind::Io);
}
