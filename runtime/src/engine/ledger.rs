//! Hard caps on memory: what is promised to whom, and what is left.

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, ErrorKind, Result};

/// Bytes of host and device memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bytes {
    /// Memory of the process: allocations for weights, KV caches and activations. Mapped files do not count.
    pub host: u64,
    /// Memory of the GPU.
    pub device: u64,
}

impl Bytes {
    /// Both sums, or the largest number instead of an overflow.
    pub fn plus(self, other: Self) -> Self {
        Self { host: self.host.saturating_add(other.host), device: self.device.saturating_add(other.device) }
    }
}

/// What one engine may use, and what it does.
#[derive(Debug)]
pub(crate) struct Ledger {
    /// The largest number where there is no cap: an `Option` is compared before its tag is looked at, which memory
    /// checkers take for a fault.
    caps: Bytes,
    used: Mutex<Bytes>,
}

/// A promise of memory; given back when dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    ledger: Arc<Ledger>,
    bytes: Bytes,
}

impl Ledger {
    /// Nothing used yet; `None` has no cap.
    pub(crate) fn new(host: Option<u64>, device: Option<u64>) -> Arc<Self> {
        let caps = Bytes { host: host.unwrap_or(u64::MAX), device: device.unwrap_or(u64::MAX) };
        Arc::new(Self { caps, used: Mutex::default() })
    }

    /// What is promised at the moment.
    pub(crate) fn used(&self) -> Bytes {
        *self.lock()
    }

    /// Promises memory for `what`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] naming the needed bytes, the cap and what is left of it.
    pub(crate) fn lease(self: &Arc<Self>, what: &str, bytes: Bytes) -> Result<Lease> {
        let mut lease = Lease { ledger: self.clone(), bytes: Bytes::default() };
        lease.resize(what, bytes)?;
        Ok(lease)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Bytes> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lease {
    /// Promises another amount instead.
    ///
    /// # Errors
    /// As [`Ledger::lease`]; the old promise stays then.
    pub(crate) fn resize(&mut self, what: &str, bytes: Bytes) -> Result<()> {
        let mut used = self.ledger.lock();
        let others = Bytes { host: used.host - self.bytes.host, device: used.device - self.bytes.device };
        let next = others.plus(bytes);
        for (kind, need, mine, others, next, cap) in [
            ("host", bytes.host, self.bytes.host, others.host, next.host, self.ledger.caps.host),
            ("device", bytes.device, self.bytes.device, others.device, next.device, self.ledger.caps.device),
        ] {
            if need > mine && next > cap {
                let left = cap.saturating_sub(others);
                let message =
                    format!("{what} needs {need} bytes of {kind} memory; of the {cap} allowed {left} are left");
                return Err(Error::new(ErrorKind::OutOfMemory, message));
            }
        }
        *used = next;
        self.bytes = bytes;
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut used = self.ledger.lock();
        *used = Bytes { host: used.host - self.bytes.host, device: used.device - self.bytes.device };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caps_are_hard_and_leases_come_back() {
        let ledger = Ledger::new(Some(100), None);
        let device = |n| Bytes { host: 0, device: n };
        let host = |n| Bytes { host: n, device: 0 };
        let mut first = ledger.lease("weights", host(60)).unwrap();
        let _second = ledger.lease("weights", device(u64::MAX)).unwrap();
        let error = ledger.lease("a session", host(41)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfMemory);
        let text = error.to_string();
        assert!(text.contains("a session needs 41 bytes of host memory; of the 100 allowed 40 are left"), "{text}");
        first.resize("weights", host(100)).unwrap();
        assert!(first.resize("weights", host(101)).is_err() && first.bytes == host(100));
        first.resize("weights", host(10)).unwrap();
        drop(ledger.lease("a session", host(90)).unwrap());
        drop(first);
        assert_eq!(ledger.used().host, 0);
    }
}
