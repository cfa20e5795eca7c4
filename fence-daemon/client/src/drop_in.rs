//! `fence-daemon drop-in`: what the systemd unit must permit for a configuration.
//!
//! The unit permits what usual configurations take. Whatever fence_virtd's configuration may say
//! works all the same: systemd asks this command, by a generator, and adds what it prints.

use std::fmt::Write as _;
use std::path::Path;

use fence_common::exit::{EXIT_START, EXIT_USAGE};
use fence_config::{self as config, Config, Priority, Source};

use crate::screen::{complain, print, stderr_colours};

/// The first line.
const HEAD: &str = "# By `fence-daemon drop-in`: what this configuration takes beyond fence-daemon.service.\n";

/// Prints the drop-in for the configuration in `file`, and returns the exit code.
#[must_use]
pub fn run(file: &Path) -> u8 {
    let read = config::read(file);
    let parsed = read.and_then(|(bytes, warnings)| config::parse(&Source::new(file, &bytes), warnings));
    match parsed {
        Ok((config, _)) => u8::from(!print(&text(&config))) * EXIT_START,
        Err(error) => {
            complain(error.render(stderr_colours()));
            EXIT_USAGE
        }
    }
}

/// The drop-in for a configuration.
#[must_use]
pub fn text(config: &Config) -> String {
    let wanted = [
        (config.has_vsock(), "a listener vsock", &["RestrictAddressFamilies=AF_VSOCK"][..]),
        (config.has_privileged_port(), "a port below 1024", &["CapabilityBoundingSet=CAP_NET_BIND_SERVICE"]),
        (
            config.starts_programs(),
            "a URI whose ssh is an ordinary process without rights",
            &["CapabilityBoundingSet=CAP_SETPCAP", "SystemCallFilter=@resources"],
        ),
        (config.stress.priority == Priority::Normal, "priority = \"normal\"", &["Nice=0"]),
        (
            config.stress.priority == Priority::Realtime,
            "priority = \"realtime\"",
            &["CapabilityBoundingSet=CAP_SYS_NICE", "SystemCallFilter=@resources", "RestrictRealtime=no"],
        ),
    ];
    let mut text = format!("{HEAD}[Service]\n");
    for (_, why, lines) in wanted.iter().filter(|(is_wanted, ..)| *is_wanted) {
        let _ = writeln!(text, "# {why}\n{}", lines.join("\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use fence_config::Warnings;

    use super::*;

    fn settings(settings: &str, listener: &str, uri: &str) -> Vec<String> {
        let file = format!(
            "fence_virtd {{ listener = \"{listener}\"; backend = \"libvirt\"; {settings} }}\n\
             listeners {{ multicast {{ }} tcp {{ port = \"999\"; }} vsock {{ }} }}\n\
             backends {{ libvirt {{ uri = \"{uri}\"; }} }}"
        );
        let source = Source::new(Path::new("f"), file.as_bytes());
        let (config, _) = config::parse(&source, Warnings::default()).unwrap();
        let text = text(&config);
        assert!(text.starts_with(&format!("{HEAD}[Service]\n")), "{text}");
        text.lines().skip(2).filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
    }

    #[test]
    fn only_what_the_configuration_takes_is_added() {
        const LOCAL: &str = "qemu:///system";
        assert!(settings("", "multicast", LOCAL).is_empty());
        assert_eq!(settings("", "multicast,vsock", LOCAL), ["RestrictAddressFamilies=AF_VSOCK"]);
        assert_eq!(settings("", "tcp", LOCAL), ["CapabilityBoundingSet=CAP_NET_BIND_SERVICE"]);
        for uri in ["qemu+ssh://host/system", "an-alias"] {
            let added = settings("", "multicast", uri);
            assert_eq!(added, ["CapabilityBoundingSet=CAP_SETPCAP", "SystemCallFilter=@resources"], "{uri}");
        }
        assert_eq!(settings("priority = \"normal\";", "multicast", LOCAL), ["Nice=0"]);
        let realtime = settings("priority = \"realtime\";", "multicast", LOCAL);
        assert!(realtime.contains(&"RestrictRealtime=no".to_owned()), "{realtime:?}");
    }
}
