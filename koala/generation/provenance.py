"""The mark in every image that a model made it, for programs: IPTC's digital source type in XMP.

https://iptc.org/standards/photo-metadata/. Article 50 of the EU's AI Act asks for such a mark.
"""

PNG_KEY = "XML:com.adobe.xmp"  # of the iTXt chunk that holds XMP
XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
   xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
   <Iptc4xmpExt:DigitalSourceType>SOURCE</Iptc4xmpExt:DigitalSourceType>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>""".replace(
    "SOURCE", "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
)
