//! Reads the keys that the sections of listeners have in common.

use fence_common::hash::HashKind;
use fence_common::wire::DEFAULT_PORT;

use super::contents::{Contents, Findings};
use super::error::Mistake;
use super::raw::clip;
use super::resolved::read;
use super::warning::Doubt;

/// `IFNAMSIZ` without the NUL.
const INTERFACE_NAME_MAX: usize = 15;

/// The interface that a listener is bound to; `None` for every one.
pub(super) fn interface(section: &Contents<'_>, findings: &mut Findings<'_>) -> Option<String> {
    read(section.get("interface"), None, findings, |text| {
        if text.eq_ignore_ascii_case("none") {
            return Ok(None);
        }
        // What the kernel allows as a name.
        let possible = text.len() <= INTERFACE_NAME_MAX
            && !matches!(text, "." | "..")
            && !text.contains(|c: char| c == '/' || c == ':' || c.is_whitespace());
        if possible { Ok(Some(text.to_owned())) } else { Err(Mistake::Interface(clip(text))) }
    })
}

/// A listener's port.
pub(super) fn port(section: &Contents<'_>, findings: &mut Findings<'_>) -> u16 {
    port_or(DEFAULT_PORT, section, findings)
}

/// The port of a section, or this default.
pub(super) fn port_or(default: u16, section: &Contents<'_>, findings: &mut Findings<'_>) -> u16 {
    read(section.get("port"), default, findings, |text| match text.trim().parse() {
        Ok(0) | Err(_) => Err(Mistake::Port(clip(text))),
        Ok(port) => Ok(port),
    })
}

/// Whether `family` is IPv4, if it is set.
pub(super) fn family(section: &Contents<'_>, findings: &mut Findings<'_>) -> Option<bool> {
    read(section.get("family"), None, findings, |text| match text.to_ascii_lowercase().as_str() {
        "ipv4" => Ok(Some(true)),
        "ipv6" => Ok(Some(false)),
        _ => Err(Mistake::Family(clip(text))),
    })
}

pub(super) fn digest(key: &'static str, section: &Contents<'_>, findings: &mut Findings<'_>) -> HashKind {
    let item = section.get(key);
    let kind = read(item, HashKind::Sha256, findings, |text| {
        let known = || vec!["sha256", "sha512", "sha1", "none"];
        HashKind::from_name(text).ok_or_else(|| Mistake::Choice { key, value: clip(text), known: known() })
    });
    if let (Some(item), HashKind::None) = (item, kind) {
        findings.doubt(&item.value.span, || Doubt::NoDigest(key));
    }
    kind
}
