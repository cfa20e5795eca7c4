//! `fence-daemon check-config`: the configuration as the daemon understands it, and what is
//! doubtful about it on this host.
//!
//! What is printed is what counts: reading it again gives the same configuration. What has no
//! effect (unknown keys, sections of other listeners) is not in it.

use std::net::ToSocketAddrs;
use std::path::Path;
use std::time::Duration;

use fence_common::exit::{EXIT_START, EXIT_USAGE};
use fence_config as config;
use fence_config::{Config, Doubt, Groups, Source, TcpAddress, Unmatched, Warnings, render};
use fence_net::interface::{Interface, Wanted};
use fence_net::taker::Taker;

use crate::probe::Probe;
use crate::screen::{complain, print, stderr_colours};

/// How long libvirt may take to list its domains.
const LISTED_WITHIN: Duration = Duration::from_secs(5);

/// Checks the configuration, prints it, and returns the exit code.
#[must_use]
pub fn run(file: &Path, probe: &dyn Probe) -> u8 {
    let colours = stderr_colours();
    let checked = config::read(file).and_then(|(bytes, warnings)| {
        let (config, warnings) = config::parse(&Source::new(file, &bytes), warnings)?;
        Ok((bytes, config, warnings))
    });
    let (bytes, config, mut warnings) = match checked {
        Ok(checked) => checked,
        Err(error) => {
            complain(error.render(colours));
            return EXIT_USAGE;
        }
    };
    look_at_interfaces(&config, &mut warnings);
    look_at_names(&config, &mut warnings);
    look_at_domains(&config, probe, &mut warnings);
    let mut text = render::render(&config, &bytes);
    let keys = config::key::load_all(&config.listeners, &config.groups, &mut warnings);
    if let Ok(keys) = &keys {
        text.push_str(&render::key_note(keys));
    }
    let is_written = print(&text);
    match keys {
        Ok(_) => {
            if !warnings.is_empty() {
                complain(warnings.render(colours));
            }
            if is_written { 0 } else { EXIT_START }
        }
        Err(error) => {
            complain(config::unusable_key(&Source::new(file, &bytes), error, warnings).render(colours));
            complain(format_args!(
                "fence-daemon: the daemon would not start without the key (exit status {EXIT_USAGE})"
            ));
            EXIT_USAGE
        }
    }
}

/// Warns about each multicast listener's interface that does not exist now, or whose frames
/// something else takes.
fn look_at_interfaces(config: &Config, warnings: &mut Warnings) {
    for multicast in config.multicasts() {
        let wanted = multicast.interface.clone().map_or(Wanted::Suitable(multicast.group), Wanted::Named);
        if wanted.there().is_empty() {
            warnings.push(None, Doubt::InterfaceMissing(multicast.interface.clone()));
        }
        let named = multicast.interface.as_deref().and_then(Interface::meant_by);
        if let Some(interface) = named
            && let Some(taker) = Taker::of(&interface)
        {
            let (interface, what, instead) = (interface.name, taker.to_string(), taker.help());
            warnings.push(None, Doubt::InterfaceTaken { interface, what, instead });
        }
    }
}

/// Warns about each tcp listener's name that has no address now, or none that guests can reach.
fn look_at_names(config: &Config, warnings: &mut Warnings) {
    for tcp in config.tcps() {
        let TcpAddress::Name { name, is_v4 } = &tcp.address else { continue };
        let found = (name.as_str(), tcp.port).to_socket_addrs();
        let found: Vec<_> = found.into_iter().flatten().map(|address| address.ip()).collect();
        let mut meant = found.iter().filter(|ip| is_v4.is_none_or(|v4| v4 == ip.is_ipv4())).peekable();
        if meant.peek().is_none() {
            warnings.push(None, Doubt::NameUnknown(name.clone()));
        } else if meant.all(|ip| ip.is_loopback()) {
            warnings.push(None, Doubt::NameOfThisHost(name.clone()));
        }
    }
}

/// Warns about each group entry that no domain has. If a URI does not answer there is no warning,
/// since the domain may be there.
fn look_at_domains(config: &Config, probe: &dyn Probe, warnings: &mut Warnings) {
    if config.groups == Groups::Everyone {
        return;
    }
    let answers = probe.domains(&config.uris, LISTED_WITHIN);
    let Ok(listed) = answers.into_iter().map(|(_, answer)| answer).collect::<Result<Vec<_>, _>>() else { return };
    let domains: Vec<_> = listed.iter().flatten().map(|domain| (domain.name.as_str(), domain.uuid)).collect();
    for Unmatched { group, entry } in config.groups.unmatched(&domains) {
        warnings.push(None, Doubt::NoSuchDomain { group, entry });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_interface_is_doubtful_and_no_more() {
        let read = |interface: &str| {
            let file = format!(
                "fence_virtd {{ listener = \"multicast\"; backend = \"libvirt\"; }} \
                 listeners {{ multicast {{ interface = \"{interface}\"; }} }}"
            );
            config::parse(&Source::new(Path::new("f"), file.as_bytes()), Warnings::default()).unwrap()
        };
        let (config, mut warnings) = read("lo");
        look_at_interfaces(&config, &mut warnings);
        assert!(warnings.is_empty());
        let (config, mut warnings) = read("no-such-if");
        look_at_interfaces(&config, &mut warnings);
        let said: Vec<_> = warnings.iter().map(ToString::to_string).collect();
        assert!(said[0].contains("no-such-if") && said[0].contains("waits"), "{said:?}");
        assert_eq!(said.len(), 1);
    }

    #[test]
    fn a_name_that_no_guest_can_use_is_doubtful() {
        let doubts = |address: &str| {
            let file = format!(
                "fence_virtd {{ listener = \"tcp\"; backend = \"libvirt\"; }} listeners {{ tcp {{ {address} }} }}"
            );
            let source = Source::new(Path::new("f"), file.as_bytes());
            let (config, mut warnings) = config::parse(&source, Warnings::default()).unwrap();
            look_at_names(&config, &mut warnings);
            warnings.iter().map(|warning| warning.doubt().clone()).collect::<Vec<_>>()
        };
        assert_eq!(doubts("address = \"localhost\";"), [Doubt::NameOfThisHost("localhost".into())]);
        // RFC 2606 reserves the domain.
        let unknown = "no-such-host.invalid";
        assert_eq!(doubts(&format!("address = \"{unknown}\";")), [Doubt::NameUnknown(unknown.into())]);
        assert_eq!(doubts("address = \"192.0.2.1\";"), []);
    }
}
