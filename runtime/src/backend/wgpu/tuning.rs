//! What [`super::tune`] found fastest on adapters, as text that a host keeps.
//!
//! A section begins with `for`, the number of the kernels and the adapter with its driver, and has a line for every choice:
//! `size`, the form of the product, outputs, inputs and group size of the matrix, and the invocations of a workgroup.
//! Only a section for this very adapter, driver and set of kernels counts.

use awqua_shaders::{ALL, Elem, Reduce, Size, Variant, compose};

use super::adapters::AdapterSummary;
use crate::checksum::Checksum;

/// First line of the text.
const TITLE: &str = "awqua tuning 1";
/// Longest text that is looked at, in bytes.
const LONGEST: usize = 1 << 20;

/// How a packed matrix is multiplied with few rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// One row, an output an invocation.
    One,
    /// One row, two outputs an invocation.
    Pair,
    /// Several rows at once.
    Rows,
}

impl Form {
    pub(super) const ALL: [Self; 3] = [Self::One, Self::Pair, Self::Rows];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::One => "one",
            Self::Pair => "pair",
            Self::Rows => "rows",
        }
    }
}

/// A product to be tuned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Site {
    pub(super) form: Form,
    /// Outputs.
    pub(super) n: u32,
    /// Inputs.
    pub(super) k: u32,
    pub(super) group_size: u32,
}

/// The choices for one adapter; none are the defaults.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Tuning {
    pub(super) sizes: Vec<(Site, Size)>,
}

impl Tuning {
    /// The choices for the adapter in what was saved, `None` if there are none.
    ///
    /// # Errors
    /// Why the text is none of ours, for people.
    pub(super) fn parse(saved: &[u8], adapter: &AdapterSummary, most_invocations: u32) -> Result<Option<Self>, String> {
        let (mut tuning, mut is_here, mut is_found, mut in_section) = (Self::default(), false, false, false);
        let own = key(adapter);
        for (number, line) in text(saved)?.lines().enumerate().skip(1) {
            let wrong = || format!("line {} is not understood", number + 1);
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["for", ..] => {
                    is_here = line.strip_prefix("for ") == Some(&own);
                    is_found |= is_here;
                    in_section = true;
                }
                ["size", ref choice @ ..] if in_section => {
                    let (site, size) = choice_of(choice).ok_or_else(wrong)?;
                    if is_here && size.invocations() > most_invocations {
                        return Err(wrong());
                    }
                    if is_here && tuning.size(&site).is_none() {
                        tuning.sizes.push((site, size));
                    }
                }
                _ => return Err(wrong()),
            }
        }
        Ok(is_found.then_some(tuning))
    }

    /// The size for a product, if it was tuned.
    pub(super) fn size(&self, site: &Site) -> Option<Size> {
        self.sizes.iter().find(|(other, _)| other == site).map(|(_, size)| *size)
    }

    /// `saved` with these choices in the place of earlier ones for the adapter; other text than ours is dropped.
    pub(super) fn save(&self, saved: Option<&[u8]>, adapter: &AdapterSummary) -> Vec<u8> {
        let own = key(adapter);
        let mut lines = vec![TITLE.to_owned()];
        let mut keep = false;
        for line in saved.and_then(|saved| text(saved).ok()).unwrap_or_default().lines().skip(1) {
            if let Some(other) = line.strip_prefix("for ") {
                keep = other != own;
            }
            if keep {
                lines.push(line.to_owned());
            }
        }
        lines.push(format!("for {own}"));
        lines.extend(self.sizes.iter().map(|(Site { form, n, k, group_size }, size)| {
            format!("size {} {n} {k} {group_size} {}", form.name(), size.invocations())
        }));
        lines.push(String::new());
        lines.join("\n").into_bytes()
    }
}

/// The text, if it is of this kind.
fn text(saved: &[u8]) -> Result<&str, String> {
    if saved.len() > LONGEST {
        return Err(format!("it has {} bytes, more than {LONGEST}", saved.len()));
    }
    let text = std::str::from_utf8(saved).map_err(|_| "it is no text".to_owned())?;
    match text.lines().next() {
        Some(TITLE) => Ok(text),
        _ => Err(format!("it does not begin with `{TITLE}`")),
    }
}

fn choice_of(words: &[&str]) -> Option<(Site, Size)> {
    let &[form, n, k, group_size, invocations] = words else { return None };
    let form = Form::ALL.into_iter().find(|other| other.name() == form)?;
    let invocations: u32 = invocations.parse().ok()?;
    let sizes = [Size::Small, Size::Medium, Size::Large];
    let size = sizes.into_iter().find(|size| size.invocations() == invocations)?;
    Some((Site { form, n: n.parse().ok()?, k: k.parse().ok()?, group_size: group_size.parse().ok()? }, size))
}

/// What tells the kernels, the adapter and its driver from others.
fn key(adapter: &AdapterSummary) -> String {
    let mut sum = Checksum::default();
    // Both preludes of the axes that products have.
    let other = Variant { elem: Elem::F16, reduce: Reduce::Subgroup, ..Variant::default() };
    for (kernel, variant) in ALL.iter().flat_map(|kernel| [(kernel, Variant::default()), (kernel, other)]) {
        sum.add(compose(kernel, variant).as_bytes());
    }
    let AdapterSummary { name, api, driver, .. } = adapter;
    format!("{:016x} {api} {name} / {driver}", sum.finish()).replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(name: &str) -> AdapterSummary {
        AdapterSummary {
            index: 0,
            name: name.to_owned(),
            api: "vulkan",
            kind: "discrete",
            driver: "driver 1.2\n3".to_owned(),
            ids: Default::default(),
            f16: true,
            subgroup: None,
            max_buffer_bytes: 0,
            max_binding_bytes: 0,
            workgroup_bytes: 0,
            unusable: None,
        }
    }

    fn tuning(size: Size) -> Tuning {
        let site = |form, n| Site { form, n, k: 64, group_size: 32 };
        Tuning { sizes: vec![(site(Form::One, 5), size), (site(Form::Pair, 6), Size::Small)] }
    }

    #[test]
    fn choices_come_back_for_their_adapter_alone() {
        let (a, b) = (adapter("A"), adapter("B"));
        let saved = tuning(Size::Large).save(None, &a);
        let saved = tuning(Size::Medium).save(Some(&saved), &b);
        assert_eq!(Tuning::parse(&saved, &a, 1024), Ok(Some(tuning(Size::Large))));
        assert_eq!(Tuning::parse(&saved, &b, 1024), Ok(Some(tuning(Size::Medium))));
        assert_eq!(Tuning::parse(&saved, &adapter("C"), 1024), Ok(None));
        let newer = AdapterSummary { driver: "driver 1.3".to_owned(), ..adapter("A") };
        assert_eq!(Tuning::parse(&saved, &newer, 1024), Ok(None));
        // New choices take the place of the old ones.
        let again = tuning(Size::Small).save(Some(&saved), &a);
        assert_eq!(Tuning::parse(&again, &a, 1024), Ok(Some(tuning(Size::Small))));
        assert_eq!(again.len(), saved.len() - 1);
        // Workgroups that the device does not have are not taken.
        assert!(Tuning::parse(&saved, &a, 512).is_err());
    }

    #[test]
    fn other_text_is_refused() {
        let a = adapter("A");
        let saved = tuning(Size::Large).save(None, &a);
        let text = String::from_utf8(saved.clone()).unwrap();
        for hostile in [
            String::new(),
            "something else".to_owned(),
            text.replace("tuning 1", "tuning 2"),
            text.replace("1024", "1023"),
            text.replace(" 5 ", " 99999999999 "),
            text.replace("one", "two"),
            text.replace("size one", "size"),
            text.clone() + "more\n",
            text.clone() + &"x".repeat(LONGEST),
        ] {
            assert!(Tuning::parse(hostile.as_bytes(), &a, 1024).is_err(), "{hostile:.60}");
        }
        for cut in 0..saved.len() {
            // Whatever is left of it, choices are those that were made, or none.
            if let Ok(Some(found)) = Tuning::parse(&saved[..cut], &a, 1024) {
                assert!(found.sizes.iter().all(|choice| tuning(Size::Large).sizes.contains(choice)), "{cut}");
            }
        }
        assert!(Tuning::parse(&[0xff; 40], &a, 1024).is_err());
        // What can not be read is dropped when new choices are saved.
        assert_eq!(tuning(Size::Large).save(Some(b"\xffgarbage"), &a), saved);
    }
}
