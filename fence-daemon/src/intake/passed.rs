//! The sockets that systemd has opened for the listeners (socket activation), each with the name of
//! its listener, and those that it has kept for multicast listeners over a restart.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;

use fence_config::Listener;
use fence_net::interface::Interface;
use socket2::{Domain, Protocol, Socket, Type};
use tracing::warn;

use super::port::{At, ListeningPort, NoPort, OpenPort};
use crate::systemd::{self, PassedSocket};

/// The beginning of the names of kept sockets. An interface's name follows.
const KEPT: &str = "request-socket.";

/// The name by which systemd keeps the socket of a listener on this interface. systemd takes
/// printable ASCII without a colon.
pub(super) fn kept_name(interface: &str) -> Option<String> {
    let is_plain = interface.bytes().all(|byte| byte.is_ascii_graphic() && byte != b':');
    is_plain.then(|| format!("{KEPT}{interface}"))
}

/// A listener's port, and its socket if that is of use.
type Given = (Arc<ListeningPort>, Option<OpenPort>);

/// The sockets that no listener has taken yet.
#[derive(Debug, Default)]
pub struct Passed(Vec<(String, Socket)>);

impl Passed {
    /// What systemd has passed.
    #[must_use]
    pub fn new(sockets: Vec<PassedSocket>) -> Self {
        let socket = |PassedSocket { name, fd }: PassedSocket| (name, Socket::from(fd));
        Self(sockets.into_iter().map(socket).collect())
    }

    /// The socket that an earlier daemon had for this group, and the interface on which it has
    /// heard the group meanwhile. Those that are bound to an interface are closed: they have the
    /// port.
    pub(super) fn kept(&mut self, group: IpAddr, port: u16) -> Option<(String, Socket)> {
        self.close(|name, socket| is_kept(name, socket, group, port) && bound_to(socket) != Some(0));
        let at = self.0.iter().position(|(name, socket)| is_kept(name, socket, group, port))?;
        let (name, socket) = self.0.swap_remove(at);
        Some((name.trim_start_matches(KEPT).to_owned(), socket))
    }

    /// The socket that an earlier daemon had for this group, bound to this interface.
    pub(super) fn kept_on(&mut self, group: IpAddr, port: u16, interface: &Interface) -> Option<Socket> {
        let called = kept_name(&interface.name)?;
        let is_it = |(name, socket): &(String, Socket)| {
            *name == called && is_kept(name, socket, group, port) && bound_to(socket) == Some(interface.index)
        };
        let at = self.0.iter().position(is_it)?;
        Some(self.0.swap_remove(at).1)
    }

    /// Closes the kept sockets that no listener has taken, here and at systemd: their ports are
    /// free then.
    pub fn close_kept(&mut self) {
        self.close(|name, _| name.starts_with(KEPT));
    }

    fn close(&mut self, is_over: impl Fn(&str, &Socket) -> bool) {
        self.0.retain(|(name, socket)| {
            let is_over = is_over(name, socket);
            if is_over {
                systemd::keep_no_more(name);
            }
            !is_over
        });
    }

    /// The TCP sockets of this listener. If there is none of use, its port says why.
    pub(super) fn tcp(&mut self, listener: &Listener) -> Vec<Given> {
        let nowhere = At::Tcp { address: SocketAddr::from(([0; 4], 0)), interface: None, only_v6: false };
        let at = |socket: &Socket| {
            let address = socket.local_addr().ok()?.as_socket()?;
            Some(At::Tcp { address, interface: None, only_v6: false })
        };
        self.take(listener, nowhere, &[Domain::IPV4, Domain::IPV6], at)
    }

    /// The vsock sockets of this listener.
    pub(super) fn vsock(&mut self, listener: &Listener) -> Vec<Given> {
        let at = |socket: &Socket| {
            let (_, port) = socket.local_addr().ok()?.as_vsock_address()?;
            Some(At::Vsock(u16::try_from(port).unwrap_or_default()))
        };
        self.take(listener, At::Vsock(0), &[Domain::VSOCK], at)
    }

    /// Those of the listener's name and of its families: a name may be that of several listeners.
    fn take(
        &mut self,
        listener: &Listener,
        nowhere: At,
        families: &[Domain],
        at: impl Fn(&Socket) -> Option<At>,
    ) -> Vec<Given> {
        let name = listener.called().to_owned();
        let is_mine = |(called, socket): &(String, Socket)| {
            called.eq_ignore_ascii_case(&name) && socket.domain().is_ok_and(|domain| families.contains(&domain))
        };
        let (mine, others) = std::mem::take(&mut self.0).into_iter().partition::<Vec<_>, _>(is_mine);
        self.0 = others;
        let mut given: Vec<Given> = Vec::new();
        for (_, socket) in mine {
            let port = ListeningPort::new(listener.label(), at(&socket).unwrap_or_else(|| nowhere.clone()));
            let opened = match unfit(&socket) {
                None => port.take(socket),
                Some(what) => {
                    port.refuse(NoPort::Unfit { name: name.clone(), what });
                    None
                }
            };
            given.push((port, opened));
        }
        if given.is_empty() {
            let port = ListeningPort::new(listener.label(), nowhere);
            port.refuse(NoPort::NotPassed(name));
            given.push((port, None));
        }
        given
    }

    /// Closes the rest, which no listener wants, and says so.
    pub fn close_rest(self) {
        for (name, _) in self.0 {
            warn!(
                "systemd passes a socket called {name:?}, and no listener of this name has `socket = \"systemd\"`: closed"
            );
        }
    }
}

/// Whether a socket is one that was kept for this group.
fn is_kept(name: &str, socket: &Socket, group: IpAddr, port: u16) -> bool {
    let address = socket.local_addr().ok().and_then(|address| address.as_socket());
    name.starts_with(KEPT)
        && socket.r#type().is_ok_and(|kind| kind == Type::DGRAM)
        && address.is_some_and(|address| address.ip() == group && address.port() == port)
}

/// The index of the interface that a socket is bound to; 0 if it is bound to none.
fn bound_to(socket: &Socket) -> Option<u32> {
    socket.device_index_v4().ok().map(|index| index.map_or(0, NonZeroU32::get))
}

/// Why no client can connect to a socket.
fn unfit(socket: &Socket) -> Option<&'static str> {
    let (kind, listens, protocol) = (socket.r#type().ok(), socket.is_listener().ok(), socket.protocol().ok().flatten());
    if kind != Some(Type::STREAM) {
        Some("is no stream (write `ListenStream=`)")
    } else if listens != Some(true) {
        Some("does not listen (write `Accept=no`)")
    } else if socket.domain().is_ok_and(|domain| domain != Domain::VSOCK) && protocol != Some(Protocol::TCP) {
        Some("is no TCP socket")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use fence_config::{Source, Warnings, parse};

    use super::*;

    /// The tcp listeners of a file with these sections.
    fn listeners(sections: &str) -> Vec<Listener> {
        let text = format!("fence_virtd {{ listener = \"tcp\"; backend = \"libvirt\"; }} listeners {{ {sections} }}");
        parse(&Source::new(Path::new("f"), text.as_bytes()), Warnings::default()).unwrap().0.listeners
    }

    fn socket(domain: Domain, kind: Type, listens: bool) -> Socket {
        let socket = Socket::new(domain, kind, None).unwrap();
        let ip: IpAddr =
            if domain == Domain::IPV4 { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() };
        socket.bind(&SocketAddr::new(ip, 0).into()).unwrap();
        if listens {
            socket.listen(1).unwrap();
        }
        socket
    }

    fn statuses(given: &[Given]) -> Vec<(bool, String)> {
        given
            .iter()
            .map(|(port, opened)| {
                assert_eq!(opened.is_some(), port.status().0);
                port.status()
            })
            .collect()
    }

    #[tokio::test]
    async fn a_listener_takes_the_sockets_of_its_name_and_its_family() {
        let all = listeners("tcp { socket = \"systemd\"; } tcp \"dmz\" { socket = \"systemd\"; }");
        let good = || socket(Domain::IPV4, Type::STREAM, true);
        let mut passed = Passed(vec![
            ("tcp".to_owned(), good()),
            ("DMZ".to_owned(), socket(Domain::IPV6, Type::STREAM, true)),
            ("dmz".to_owned(), good()),
            ("other".to_owned(), good()),
        ]);
        let listening = || (true, "listening".to_owned());
        assert_eq!(statuses(&passed.tcp(&all[0])), [listening()]);
        assert_eq!(statuses(&passed.tcp(&all[1])), [listening(), listening()]);
        assert_eq!(passed.0.len(), 1, "what nobody has asked for");
    }

    #[tokio::test]
    async fn a_kept_socket_is_its_listeners_or_nobodys() {
        let kept = || socket(Domain::IPV4, Type::DGRAM, false);
        let (one, other) = (kept(), kept());
        let port = |socket: &Socket| socket.local_addr().unwrap().as_socket().unwrap().port();
        let (first, second, home) = (port(&one), port(&other), IpAddr::from([127, 0, 0, 1]));
        let called = |name: &str| kept_name(name).unwrap();
        let mut passed = Passed(vec![(called("virbr0"), one), (called("virbr1"), other), ("tcp".to_owned(), kept())]);
        assert!(passed.kept([225, 0, 0, 12].into(), first).is_none() && first != second);
        let taken = passed.kept(home, first).map(|(interface, socket)| (interface, port(&socket)));
        assert_eq!(taken, Some(("virbr0".to_owned(), first)));
        assert!(passed.kept(home, first).is_none());
        passed.close_kept();
        assert_eq!(passed.0.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["tcp"]);
        assert_eq!((kept_name("a:b"), kept_name("a b"), kept_name("\u{fc}")), (None, None, None));
    }

    #[tokio::test]
    async fn a_kept_socket_that_is_bound_is_for_its_interface_alone() {
        let (lo, home) = (Interface::named("lo").unwrap(), IpAddr::from([127, 0, 0, 1]));
        let kept = || {
            let kept = socket(Domain::IPV4, Type::DGRAM, false);
            kept.bind_device_by_index_v4(NonZeroU32::new(lo.index)).unwrap();
            let port = kept.local_addr().unwrap().as_socket().unwrap().port();
            (Passed(vec![(kept_name("lo").unwrap(), kept)]), port)
        };
        let (mut passed, port) = kept();
        let other = Interface { name: "lo".to_owned(), index: lo.index + 1 };
        assert!(passed.kept_on(home, port, &other).is_none(), "another one has the name by now");
        assert!(passed.kept_on(home, port + 1, &lo).is_none());
        assert!(passed.kept_on(home, port, &lo).is_some() && passed.0.is_empty());
        // It has the port, so it must be gone before another one is opened.
        let (mut passed, port) = kept();
        assert!(passed.kept(home, port).is_none() && passed.0.is_empty());
    }

    #[tokio::test]
    async fn a_socket_that_no_client_can_connect_to_is_refused_and_says_why() {
        let all = listeners("tcp { socket = \"systemd\"; }");
        for (given, said) in [
            (
                None,
                "systemd passes no socket called tcp (its unit needs `FileDescriptorName=tcp`, and must be started)",
            ),
            (
                Some(socket(Domain::IPV4, Type::DGRAM, false)),
                "the socket called tcp that systemd passes is no stream (write `ListenStream=`)",
            ),
            (
                Some(socket(Domain::IPV4, Type::STREAM, false)),
                "the socket called tcp that systemd passes does not listen (write `Accept=no`)",
            ),
        ] {
            let mut passed = Passed(given.into_iter().map(|socket| ("tcp".to_owned(), socket)).collect());
            assert_eq!(statuses(&passed.tcp(&all[0])), [(false, said.to_owned())]);
        }
        // Another family is not the listener's.
        let unix = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        let mut passed = Passed(vec![("tcp".to_owned(), unix)]);
        assert!(statuses(&passed.tcp(&all[0]))[0].1.contains("passes no socket called tcp") && passed.0.len() == 1);
    }
}
