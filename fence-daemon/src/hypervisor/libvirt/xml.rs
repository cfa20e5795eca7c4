//! What a domain's XML says.

use std::sync::Arc;

use roxmltree::{Document, Node};

use fence_net::neighbour::Mac;

/// The Ethernet addresses of a domain's network interfaces.
pub(crate) fn macs(xml: &str) -> Result<Arc<[Mac]>, roxmltree::Error> {
    let document = Document::parse(xml)?;
    // Metadata may hold anything, so the whole path counts.
    let path = ["mac", "interface", "devices", "domain"];
    let is_ours =
        |node: &Node<'_, '_>| node.ancestors().map(|at| at.tag_name().name()).eq(path.into_iter().chain([""]));
    let found = document.descendants().filter(is_ours).filter_map(|mac| mac_of(mac.attribute("address")?));
    Ok(found.collect())
}

fn mac_of(text: &str) -> Option<Mac> {
    let bytes: Option<Vec<_>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
