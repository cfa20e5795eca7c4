//! Section `backends { cpg { } }`: the hypervisors of a corosync cluster answer together.

use strum::{IntoStaticStr, VariantArray};

use super::choices::choice;
use super::contents::{Contents, Findings, Scope};
use super::listeners::Listener;
use super::raw::{Span, clip};
use super::resolved::{NOTHING, read};

pub(super) const CPG: Scope<'static> = Scope {
    keys: &["name_mode", "unfenced_hosts", "kill", "reboot_method", "reboot_pause", "reboot_reply"],
    numbered: &["uri"],
    ..NOTHING
};

/// Who answers for a domain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum Backend {
    /// This host alone.
    #[default]
    Libvirt,
    /// All hosts of a corosync cluster together.
    Cpg,
}

impl Backend {
    /// The name in the file.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// The path of its section.
    #[must_use]
    pub fn section(self) -> &'static [&'static str] {
        match self {
            Self::Libvirt => &["backends", "libvirt"],
            Self::Cpg => &["backends", "cpg"],
        }
    }
}

/// Which of a domain's two names fence_virtd takes a request's text for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "lowercase")]
enum NameMode {
    #[default]
    Name,
    Uuid,
}

/// A mistake about this backend.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpgMistake {
    /// `unfenced_hosts` is not "fail".
    #[error("`unfenced_hosts` can only be \"fail\", not \"{0}\"")]
    UnfencedHosts(String),
    /// No listener has a key.
    #[error("the backend \"cpg\" has no key to sign with")]
    NoKey,
    /// The URIs are in the section of another backend.
    #[error("the backend \"cpg\" has no section")]
    NoSection,
}

impl CpgMistake {
    /// The text beside the caret.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::UnfencedHosts(_) => "a silent host may still run the machine",
            Self::NoKey => "no listener here has a key",
            Self::NoSection => "the section `libvirt` is not read",
        }
    }

    /// The remedy.
    #[must_use]
    pub fn help(&self) -> &'static str {
        match self {
            Self::UnfencedHosts(_) => "remove it, and let Pacemaker fence the hosts: a fenced host's machines are off",
            Self::NoKey => "add a listener with a `key_file`, such as `listener = \"multicast,serial\";`",
            Self::NoSection => "write `backends { cpg { uri = \"qemu:///system\"; } }`",
        }
    }
}

/// Checks the keys that only this backend has. They have one value each, or no effect here.
pub(super) fn cpg(section: &Contents<'_>, findings: &mut Findings<'_>) {
    let _: NameMode = choice(section, "name_mode", findings);
    read(section.get("unfenced_hosts"), (), findings, |text| {
        if text.eq_ignore_ascii_case("fail") { Ok(()) } else { Err(CpgMistake::UnfencedHosts(clip(text)).into()) }
    });
}

/// Checks that the messages between hosts can be signed. `at` is where `backend` names this one.
pub(super) fn key(listeners: &[Listener], at: &Span, findings: &mut Findings<'_>) {
    if listeners.iter().all(|listener| listener.key_files().is_none()) {
        findings.mistake(at, CpgMistake::NoKey.into());
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{Config, ConfigError, Doubt, Kill, Mistake, Source, Warnings, parse};

    fn read(text: &str) -> Result<(Config, Warnings), Vec<Mistake>> {
        match parse(&Source::new(Path::new("f"), text.as_bytes()), Warnings::default()) {
            Err(ConfigError::Mistakes(mistakes)) => Err(mistakes.iter().map(|(_, mistake)| mistake.clone()).collect()),
            other => Ok(other.unwrap()),
        }
    }

    fn with(section: &str) -> Result<(Config, Warnings), Vec<Mistake>> {
        read(&format!("fence_virtd {{ listener = \"multicast\"; backend = \"CPG\"; }}\n{section}"))
    }

    #[test]
    fn its_own_section_counts_and_the_other_one_does_not() {
        let both = "backends { libvirt { uri = \"lxc:///\"; kill = \"libvirt\"; } \
                    cpg { uri = \"test:///default\"; uri1 = \"qemu:///system\"; name_mode = \"UUID\"; } }";
        let (config, warnings) = with(both).unwrap();
        assert!(warnings.is_empty(), "{}", warnings.render(false));
        assert_eq!((config.backend, config.hypervisor.kill), (Backend::Cpg, Kill::Direct));
        assert_eq!(config.uris, ["test:///default", "qemu:///system"]);
        let (config, _) = with("backends { cpg { kill = \"libvirt\"; unfenced_hosts = \"Fail\"; } }").unwrap();
        assert_eq!((config.uris, config.hypervisor.kill), (vec!["qemu:///system".to_owned()], Kill::Libvirt));
        // With the other backend this one is not read, as ever.
        let other = "fence_virtd { listener = \"multicast\"; backend = \"libvirt\"; }";
        let (config, warnings) =
            read(&format!("{other} backends {{ cpg {{ uri = \"x:\"; zork = \"1\"; }} }}")).unwrap();
        assert_eq!((config.backend, config.uris), (Backend::Libvirt, vec!["qemu:///system".to_owned()]));
        assert!(warnings.is_empty(), "{}", warnings.render(false));
    }

    #[test]
    fn what_could_call_a_living_machine_off_is_a_mistake() {
        for value in ["off", "ignore", "0", "no"] {
            let refused = with(&format!("backends {{ cpg {{ unfenced_hosts = \"{value}\"; }} }}")).unwrap_err();
            assert_eq!(refused, [CpgMistake::UnfencedHosts(value.into()).into()]);
        }
        // The machines at the URIs of the other section would be called unknown.
        assert_eq!(with("backends { libvirt { uri = \"lxc:///\"; } }").unwrap_err(), [CpgMistake::NoSection.into()]);
        assert!(with("backends { }").is_ok() && with("").is_ok());
    }

    #[test]
    fn messages_need_a_key() {
        let of = |listeners: &str| {
            read(&format!(
                "fence_virtd {{ listener = \"{listeners}\"; backend = \"cpg\"; }} listeners {{ \
                 multicast {{ hash = \"none\"; auth = \"none\"; }} serial {{ path = \"/x\"; permit = \"everyone\"; }} }}"
            ))
        };
        for (listeners, has_one) in [("serial", false), ("multicast,serial", false), ("vsock,serial", true)] {
            match of(listeners) {
                Ok(_) => assert!(has_one, "{listeners}"),
                Err(refused) => assert!(!has_one && refused == [CpgMistake::NoKey.into()], "{listeners}: {refused:?}"),
            }
        }
    }

    #[test]
    fn name_mode_has_stocks_values_and_a_misspelt_key_is_named() {
        let refused = with("backends { cpg { name_mode = \"both\"; } }").unwrap_err();
        assert!(matches!(refused.as_slice(), [Mistake::Choice { key: "name_mode", .. }]), "{refused:?}");
        let (_, warnings) = with("backends { cpg { unfenced_host = \"x\"; } }").unwrap();
        let doubts: Vec<_> = warnings.iter().map(|warning| warning.doubt().clone()).collect();
        let meant = Some("unfenced_hosts");
        assert_eq!(doubts, [Doubt::UnknownKey { name: "unfenced_host".into(), meant }]);
    }
}
