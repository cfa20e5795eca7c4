//! What a domain's XML says.

use std::sync::Arc;

use roxmltree::{Document, Node};

use fence_net::neighbour::Mac;

/// The Ethernet addresses of a domain's network interfaces.
pub(crate) fn macs(xml: &str) -> Result<Arc<[Mac]>, roxmltree::Error> {
    let document = Document::parse(xml)?;
    let found = document.descendants().filter(|node| is_at(node, ["mac", "interface", "devices", "domain"]));
    Ok(found.filter_map(|mac| mac_of(mac.attribute("address")?)).collect())
}

/// A running domain's vsock number. `None` if it has none, or the XML is damaged.
pub(crate) fn cid(xml: &str) -> Option<u32> {
    let document = Document::parse(xml).ok()?;
    let found = document.descendants().find(|node| is_at(node, ["cid", "vsock", "devices", "domain"]))?;
    found.attribute("address")?.parse().ok()
}

/// Whether a node has this path, from itself to the root. Metadata may hold anything, so the whole
/// path counts.
fn is_at(node: &Node<'_, '_>, path: [&str; 4]) -> bool {
    node.ancestors().map(|at| at.tag_name().name()).eq(path.into_iter().chain([""]))
}

/// A UNIX socket at which a device of a running domain listens: the host's end of the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DeviceSocket {
    pub(crate) kind: SocketKind,
    pub(crate) path: String,
}

/// What the guest has at its end of such a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketKind {
    /// A serial port (`<serial>`).
    Serial,
    /// A channel (`<channel>`).
    Channel,
}

/// The sockets of a running domain's serial ports and channels, without those that are somebody
/// else's: its console, and the channel of its guest agent.
///
/// libvirt shows the first serial port as `<console>` once more, with the same socket. So a port is
/// the console exactly if a `<console>` has its socket.
pub(crate) fn device_sockets(xml: &str) -> Result<Vec<DeviceSocket>, roxmltree::Error> {
    // Most domains have none, and need not be read again.
    if !xml.contains("unix") {
        return Ok(Vec::new());
    }
    let document = Document::parse(xml)?;
    let devices = document.root_element().children().filter(|node| node.has_tag_name("devices"));
    let devices: Vec<_> = devices.flat_map(|devices| devices.children()).collect();
    let socket = |device: &Node<'_, '_>| {
        let source = child(device, "source").filter(|source| source.attribute("mode") == Some("bind"))?;
        (device.attribute("type") == Some("unix")).then(|| source.attribute("path").map(str::to_owned))?
    };
    let consoles: Vec<_> = devices.iter().filter(|device| device.has_tag_name("console")).filter_map(socket).collect();
    let is_agents = |device: &Node<'_, '_>| {
        let name = child(device, "target").and_then(|target| target.attribute("name"));
        name.is_some_and(|name| name.starts_with("org.qemu.guest_agent."))
    };
    let found = devices.iter().filter_map(|device| {
        let kind = match device.tag_name().name() {
            "serial" => SocketKind::Serial,
            "channel" if !is_agents(device) => SocketKind::Channel,
            _ => return None,
        };
        Some(DeviceSocket { kind, path: socket(device).filter(|path| !consoles.contains(path))? })
    });
    Ok(found.collect())
}

fn child<'a, 'i>(device: &Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    device.children().find(|node| node.has_tag_name(name))
}

fn mac_of(text: &str) -> Option<Mac> {
    let bytes: Option<Vec<_>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vsock_number_of_a_domain_is_read_from_its_xml() {
        let xml = |devices: &str| {
            format!(
                "<domain><metadata><vsock><cid address='9'/></vsock></metadata><devices>{devices}</devices></domain>"
            )
        };
        for (devices, expected) in [
            ("<vsock model='virtio'><cid auto='no' address='7'/><alias name='vsock0'/></vsock>", Some(7)),
            ("<disk/><vsock><cid auto='yes' address='4294967294'/></vsock>", Some(u32::MAX - 1)),
            ("<vsock><cid auto='yes'/></vsock>", None),
            ("<vsock><cid address='-1'/></vsock>", None),
            ("<disk><vsock><cid address='7'/></vsock></disk>", None),
            ("", None),
        ] {
            assert_eq!(cid(&xml(devices)), expected, "{devices}");
        }
        assert_eq!(cid("<domain>"), None);
    }

    #[test]
    fn the_addresses_of_a_domain_are_read_from_its_xml() {
        let xml = "<?xml version='1.0'?><domain type='kvm' id='3'><metadata><interface><mac address='02:00:00:00:00:99'/>\
                   </interface></metadata><name>&lt;a&gt;</name><devices><disk/><interface type='network'>\
                   <mac address='52:54:00:0a:BC:01'/><source network='default'/></interface><interface type='bridge'/>\
                   <interface type='bridge'><mac address='nonsense'/></interface><interface type='user'>\
                   <mac address='52:54:00:00:00:02'/></interface></devices></domain>";
        assert_eq!(*macs(xml).unwrap(), [[0x52, 0x54, 0, 0x0a, 0xbc, 1], [0x52, 0x54, 0, 0, 0, 2]]);
        assert!(macs("<domain><devices>").is_err());
        for odd in ["", "52:54:00:00:00", "52:54:00:00:00:00:00", "52:54:00:00:00:1ff"] {
            assert_eq!(mac_of(odd), None, "{odd}");
        }
    }

    #[test]
    fn the_sockets_of_ports_and_channels_are_read_and_others_are_left_alone() {
        let port = |tag: &str, kind: &str, mode: &str, path: &str, target: &str| {
            format!("<{tag} type='{kind}'><source mode='{mode}' path='{path}'/><target {target}/></{tag}>")
        };
        let devices = [
            port("serial", "unix", "bind", "/run/fence/console", "type='isa-serial' port='0'"),
            port("serial", "unix", "bind", "/run/fence/a&amp;b", "type='isa-serial' port='1'"),
            port("serial", "pty", "bind", "/dev/pts/4", "port='2'"),
            port("serial", "unix", "connect", "/run/somebody", "port='3'"),
            "<serial type='unix'/>".to_owned(),
            port("console", "unix", "bind", "/run/fence/console", "type='serial' port='0'"),
            port("channel", "unix", "bind", "/run/agent", "type='virtio' name='org.qemu.guest_agent.0'"),
            port("channel", "unix", "bind", "/run/fence/c", "type='guestfwd' address='10.0.2.179' port='1229'"),
            port("channel", "spicevmc", "bind", "/run/spice", "type='virtio' name='com.redhat.spice.0'"),
        ];
        let (devices, metadata) = (devices.concat(), port("serial", "unix", "bind", "/run/other", ""));
        let xml =
            format!("<domain><metadata><devices>{metadata}</devices></metadata><devices>{devices}</devices></domain>");
        let expected = [(SocketKind::Serial, "/run/fence/a&b"), (SocketKind::Channel, "/run/fence/c")];
        let expected = expected.map(|(kind, path)| DeviceSocket { kind, path: path.to_owned() });
        assert_eq!(device_sockets(&xml).unwrap(), expected);
        assert!(device_sockets("<domain>unix").is_err());
        assert_eq!(device_sockets("<domain/>").unwrap(), []);
    }
}
