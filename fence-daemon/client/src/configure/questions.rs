//! The questions, their explanations, and where each answer goes.

use std::net::IpAddr;

use fence_common::wire::{DEFAULT_GROUP_V4, DEFAULT_GROUP_V6, DEFAULT_PORT};
use fence_config::document::Document;
use fence_config::{self as config, Backend, Plugin};
use fence_net::interface::Interface;
use fence_net::taker::Taker;

use super::ConfigureError;
use super::dialogue::Dialogue;
use super::values::{GLOBAL, MULTICAST, check, check_key_file, check_uri, writable};
use crate::cli::{self, Given};

const MODULES: &str = "\
fence_virtd loads its plugins from a directory. This daemon has its plugins built in and ignores the setting. It matters only
if fence_virtd uses this file again. `none`: fence_virtd's default.";
const LISTENER: &str = "\
The listener receives the guests' requests.";
const ADDRESS: &str = "\
Guests send their requests to this multicast group. Unless they run fence_xvm with -a, that is 225.0.0.12, or
ff05::3:1 over IPv6. The address decides which of the two families is used.";
const PORT: &str = "\
The UDP port that guests send to, and the TCP port that they are called back at (fence_xvm -p).";
const INTERFACE: &str = "\
The interface that requests come from: the guests' bridge, virbr0 for libvirt's own network. Requests through other interfaces
are then ignored. `none`: every interface that is up.";
const KEY_FILE: &str = "\
Everyone who has this file's content can fence. Put the same file on this host and on every guest, and nowhere else.";
const BACKEND: &str = "\
The backend carries requests out. `libvirt`: this host answers by itself. `cpg`: the hypervisors of a corosync cluster answer
together, so each of them needs this daemon, the same key and the same backend.";
const URI: &str = "\
The libvirt connection that has the guests: qemu:///system for virtual machines of this host, lxc:/// for containers.";

/// fence_virtd's default if neither the file nor an option has a value.
const NOTHING: &str = "none";

/// The questions about one file.
pub(super) struct Questions<'q, 'd> {
    document: Document,
    given: &'q Given,
    dialogue: &'q mut Dialogue<'d>,
}

/// One of them.
struct Question<'a> {
    label: &'static str,
    about: &'static str,
    section: &'static [&'static str],
    key: &'a str,
    /// The value if neither the file nor an answer has one.
    fallback: &'a str,
    /// The option's name, and its value.
    given: Option<(&'static str, &'a str)>,
}

impl<'q, 'd> Questions<'q, 'd> {
    pub(super) fn new(document: Document, given: &'q Given, dialogue: &'q mut Dialogue<'d>) -> Self {
        Self { document, given, dialogue }
    }

    /// Asks what is not given, and returns the new file.
    pub(super) fn ask(mut self) -> Result<Document, ConfigureError> {
        let given = self.given;
        // Invalid options are reported before any question.
        self.check_options()?;

        self.modules()?;
        if !given.yes {
            self.dialogue.say(&format!("\n{}", cli::list().trim_end()))?;
        }
        self.plugin(Plugin::Listener, "Listener module", LISTENER)?;
        self.address()?;
        let port = given.port.as_deref().map(|port| ("port", port));
        self.multicast("Multicast IP Port", PORT, "port", &DEFAULT_PORT.to_string(), port)?;
        self.interface()?;
        self.key_file()?;
        self.plugin(Plugin::Backend, "Backend module", BACKEND)?;
        self.uris()?;
        for (key, value) in [("hash", &given.hash), ("auth", &given.auth)] {
            if let Some(value) = value {
                self.document.set(MULTICAST, key, value);
            }
        }
        Ok(self.document)
    }

    fn check_options(&self) -> Result<(), ConfigureError> {
        let given = self.given;
        let wrong = |option| move |why| ConfigureError::Option { option, why };
        for (option, value) in [
            ("interface", &given.interface),
            ("port", &given.port),
            ("family", &given.family),
            ("address", &given.address),
            ("hash", &given.hash),
            ("auth", &given.auth),
        ] {
            if let Some(value) = value {
                check(MULTICAST, &[(option, value)]).map_err(wrong(option))?;
            }
        }
        if let (Some(family), Some(address)) = (&given.family, &given.address) {
            check(MULTICAST, &[("family", family), ("address", address)]).map_err(wrong("address"))?;
        }
        if let Some(path) = &given.key_file {
            let path = path.to_str().ok_or_else(|| wrong("key-file")("it is not UTF-8 text".to_owned()))?;
            check_key_file(path).map_err(wrong("key-file"))?;
        }
        given.uris.iter().try_for_each(|uri| check_uri(uri).map_err(wrong("uri")))
    }

    /// Settles one question by the command line or by asking. Nothing is set yet.
    fn settle(
        &mut self,
        question: &Question<'_>,
        accept: impl Fn(&str) -> Result<(), String>,
    ) -> Result<String, ConfigureError> {
        if let Some((option, value)) = question.given {
            return match accept(value) {
                Ok(()) => Ok(value.to_owned()),
                Err(why) => Err(ConfigureError::Option { option, why }),
            };
        }
        let old = self.document.get(question.section, question.key);
        if self.given.yes {
            // The final check refuses an invalid old value, with its position: nobody can be asked
            // here.
            return Ok(old.unwrap_or(question.fallback).to_owned());
        }
        self.dialogue.say(&format!("\n{}", question.about))?;
        let mut default = question.fallback;
        if let Some(old) = old {
            match accept(old) {
                Ok(()) => default = old,
                Err(why) => self.dialogue.say(&format!("The file's present value is invalid: {why}."))?,
            }
        }
        Ok(self.dialogue.ask(question.label, default, |answer| accept(answer).map(|()| answer.to_owned()))?)
    }

    /// Asks a question whose answer goes into the file unchanged.
    fn multicast(
        &mut self,
        label: &'static str,
        about: &'static str,
        key: &'static str,
        fallback: &str,
        given: Option<(&'static str, &str)>,
    ) -> Result<(), ConfigureError> {
        let question = Question { label, about, section: MULTICAST, key, fallback, given };
        let answer = self.settle(&question, |answer| check(MULTICAST, &[(key, answer)]))?;
        self.document.set(MULTICAST, key, &answer);
        Ok(())
    }

    fn modules(&mut self) -> Result<(), ConfigureError> {
        let (label, about, key) = ("Module search path", MODULES, "module_path");
        let question = Question { label, about, section: GLOBAL, key, fallback: NOTHING, given: None };
        let answer = self.settle(&question, writable)?;
        if answer.eq_ignore_ascii_case(NOTHING) {
            self.document.remove(GLOBAL, |name| name.eq_ignore_ascii_case(key));
        } else {
            self.document.set(GLOBAL, key, &answer);
        }
        Ok(())
    }

    fn plugin(&mut self, plugin: Plugin, label: &'static str, about: &'static str) -> Result<(), ConfigureError> {
        let key = plugin.key();
        let question = Question { label, about, section: GLOBAL, key, fallback: plugin.usual(), given: None };
        let answer = self.settle(&question, |answer| check(GLOBAL, &[(key, answer)]))?;
        self.document.set(GLOBAL, key, &answer);
        Ok(())
    }

    /// Asks for the group, which decides the family: fence_virtd needs both for IPv6.
    fn address(&mut self) -> Result<(), ConfigureError> {
        let given = self.given;
        let old_family = self.document.get(MULTICAST, "family").map(str::to_owned);
        let wanted = given.family.clone();
        let fallback = match wanted.as_ref().or(old_family.as_ref()) {
            Some(family) if family.eq_ignore_ascii_case("ipv6") => IpAddr::from(DEFAULT_GROUP_V6).to_string(),
            _ => IpAddr::from(DEFAULT_GROUP_V4).to_string(),
        };
        let accept = |answer: &str| match &wanted {
            Some(family) => check(MULTICAST, &[("family", family), ("address", answer)]),
            None => check(MULTICAST, &[("address", answer)]),
        };
        // Another family needs another group than the file's.
        if wanted.is_some() && self.document.get(MULTICAST, "address").is_some_and(|old| accept(old).is_err()) {
            self.document.remove(MULTICAST, |name| name.eq_ignore_ascii_case("address"));
        }
        let given = given.address.as_deref().map(|address| ("address", address));
        let (label, about) = ("Multicast IP Address", ADDRESS);
        let question = Question { label, about, section: MULTICAST, key: "address", fallback: &fallback, given };
        let answer = self.settle(&question, accept)?;
        let family = if answer.contains(':') { "ipv6" } else { "ipv4" };
        if !self.given.yes {
            self.dialogue.say(&format!("That is {family}."))?;
        }
        // If nobody was asked, the administrator must resolve a contradiction in the old file.
        let decided = !self.given.yes || self.given.family.is_some() || self.given.address.is_some();
        if decided || old_family.is_none() {
            self.document.set(MULTICAST, "family", family);
        }
        self.document.set(MULTICAST, "address", &answer);
        Ok(())
    }

    fn interface(&mut self) -> Result<(), ConfigureError> {
        let given = self.given.interface.as_deref().map(|name| ("interface", name));
        self.multicast("Interface", INTERFACE, "interface", NOTHING, given)?;
        let name = self.document.get(MULTICAST, "interface").unwrap_or(NOTHING);
        if name.eq_ignore_ascii_case(NOTHING) {
            // fence_virtd would look for an interface of that name.
            self.document.remove(MULTICAST, |key| key.eq_ignore_ascii_case("interface"));
        } else {
            match Interface::meant_by(name) {
                None => self.dialogue.say(&format!("There is no {name} here now: the daemon will wait for it."))?,
                Some(interface) => {
                    if let Some(taker) = Taker::of(&interface) {
                        self.dialogue.say(&format!("{name} is {taker}: {}.", taker.help()))?;
                    }
                }
            }
        }
        Ok(())
    }

    fn key_file(&mut self) -> Result<(), ConfigureError> {
        let given = self.given.key_file.as_deref().and_then(|path| path.to_str()).map(|path| ("key-file", path));
        let (label, about, fallback) = ("Key File", KEY_FILE, config::DEFAULT_KEY_FILE);
        let question = Question { label, about, section: MULTICAST, key: "key_file", fallback, given };
        let answer = self.settle(&question, check_key_file)?;
        self.document.set(MULTICAST, "key_file", &answer);
        Ok(())
    }

    /// The backend that the file names by now.
    fn backend(&self) -> Backend {
        let named = self.document.get(GLOBAL, Plugin::Backend.key()).unwrap_or_default();
        if named.eq_ignore_ascii_case(Backend::Cpg.name()) { Backend::Cpg } else { Backend::Libvirt }
    }

    /// Asks for the first URI; further ones stay. URIs from the command line replace all.
    fn uris(&mut self) -> Result<(), ConfigureError> {
        let number = |key: &str| {
            let digits = key.get(3..).filter(|_| key.get(..3).is_some_and(|uri| uri.eq_ignore_ascii_case("uri")))?;
            if digits.is_empty() { Some(None) } else { digits.parse::<u64>().ok().map(Some) }
        };
        let section = self.backend().section();
        if !self.given.uris.is_empty() {
            self.document.remove(section, |key| number(key).is_some());
            for (index, uri) in self.given.uris.iter().enumerate() {
                let key = if index == 0 { "uri".to_owned() } else { format!("uri{index}") };
                self.document.set(section, &key, uri);
            }
            return Ok(());
        }
        let keys = self.document.values(section).filter_map(|(key, value)| Some((number(key)?, key.to_owned(), value)));
        let mut keys: Vec<_> = keys.map(|(number, key, value)| (number, key, value.to_owned())).collect();
        keys.sort();
        let key = keys.first().map_or("uri", |(_, key, _)| key.as_str());
        let (label, about, fallback) = ("Libvirt URI", URI, config::DEFAULT_URI);
        let question = Question { label, about, section, key, fallback, given: None };
        let answer = self.settle(&question, check_uri)?;
        self.document.set(section, key, &answer);
        for (_, key, uri) in keys.iter().skip(1) {
            if !self.given.yes {
                self.dialogue.say(&format!("Also asked, as the file says: {uri} (`{key}`)"))?;
            }
        }
        Ok(())
    }
}
